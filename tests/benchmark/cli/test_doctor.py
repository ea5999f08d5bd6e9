"""What `shiftproof doctor` finds, in health and in sickness."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shiftproof.benchmark.cli import doctor
from shiftproof.benchmark.cli.main import app

PARTS = ("python", "torch", "torch with torchvision", "threads", "faiss", "gpu", "cache folder", "plugins")


def test_every_part_is_looked_at_once_and_a_sound_machine_ends_with_0(toy: Path) -> None:
    result = CliRunner().invoke(app, ["doctor"])
    names = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert [names.count(part) for part in PARTS] == [1] * len(PARTS)
    assert result.exit_code == 0


def test_a_torchvision_that_was_built_for_another_torch_is_a_failure_with_its_cure(
    site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site.folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    found = doctor.torch_pair()
    assert found.state == "fail"
    assert "operator torchvision::nms does not exist" in found.detail
    assert "pip install --force-reinstall torch torchvision" in found.detail


def test_a_matching_pair_of_torch_and_torchvision_is_well() -> None:
    assert doctor.torch_pair().state == "ok"


def test_an_old_interpreter_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "9", "1"))
    assert doctor.python().state == "fail"


def test_a_package_that_is_not_installed_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("shiftproof", "not-a-package"))
    assert [(found.what, found.state) for found in doctor.packages()] == [("shiftproof", "ok"), ("not-a-package", "fail")]


def test_without_faiss_there_is_a_warning_and_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert (doctor.faiss().state, "pip install faiss-cpu" in doctor.faiss().detail) == ("warn", True)


def test_the_threads_are_those_of_torch() -> None:
    assert f"torch {torch.get_num_threads()}, " in doctor.threads().detail


def test_a_cache_folder_that_cannot_be_written_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "file"))
    found = doctor.cache()
    assert (found.state, "SHIFTPROOF_CACHE" in found.detail) == ("fail", True)


def test_the_table_is_printed_where_the_cache_folder_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "file"))
    result = CliRunner().invoke(app, ["doctor"])
    rows = {line.split("  ")[0]: line.split()[-1:] and line for line in result.stdout.splitlines()}
    assert result.exit_code == 1
    assert " fail " in rows["cache folder"]
    assert " fail " in rows["plugins"]
    assert " ok " in rows["python"]


def test_the_size_of_the_cache_is_that_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/a").write_bytes(b"x" * 1536)
    assert "1.5 KiB used" in doctor.cache().detail
    assert not (tmp_path / ".writable").exists()


def test_a_broken_plugin_is_a_warning_and_a_conflict_a_failure(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = "@hookimpl\ndef shiftproof_suites():\n    return [SuiteSpec('same', 'a suite', ('a',), ('b',))]\n"
    for name, source in (("one", suite), ("two", suite), ("bad", "1 / 0")):
        warm_site.install(name, source)
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "one,two,bad")
    assert [(found.what, found.state) for found in doctor.plugins()] == [("plugin bad", "warn"), ("plugins", "fail")]
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
