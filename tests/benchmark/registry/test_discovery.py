"""Plugins found, and their files watched, without importing them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.registry.discovery import Entry, find_spec, fingerprint, installed_entries

HOOK = "@hookimpl\ndef shiftproof_suites():\n    return []\n"


def test_an_installed_plugin_is_found_with_its_distribution(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("toy", HOOK, version="2.5")
    monkeypatch.delitem(sys.modules, "toy_toy", raising=False)  # other tests load plugins of that name
    assert Entry("toy", "toy_toy", "shiftproof-toy", "2.5") in installed_entries()
    assert "toy_toy" not in sys.modules


def test_the_harness_comes_first_and_then_the_names_in_order(site: Any) -> None:
    site.install("a-toy", HOOK)
    names = [entry.name for entry in installed_entries(["lws", "a-toy"])]
    assert names == ["backbones", "executors", "metrics", "a-toy", "lws"]


def test_a_plugin_called_like_a_part_of_the_harness_is_not_one(site: Any) -> None:
    site.install("metrics", HOOK, distribution="shiftproof-imitation")
    assert [entry.distribution for entry in installed_entries([]) if entry.name == "metrics"] == ["shiftproof"]


def test_a_name_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(InputError, match="got 'backbons'; did you mean 'backbones'"):
        installed_entries(["backbons"])


def test_the_file_of_a_module_is_found_without_running_its_parents(site: Any) -> None:
    file = site.install("deep", HOOK, value="heavy.inner.plugin")
    (site.folder / "heavy/__init__.py").write_text("raise RuntimeError('imported')")
    (site.folder / "heavy/inner/__init__.py").write_text("raise RuntimeError('imported')")
    spec = find_spec("heavy.inner.plugin")
    assert spec is not None
    assert spec.origin == str(file)
    assert "heavy" not in sys.modules


@pytest.mark.parametrize("module", ["not_there", "shiftproof.not_there", "os.path.not_there", "json.decoder.not_there"])
def test_a_module_that_is_not_there_has_no_fingerprint(module: str) -> None:
    assert fingerprint(module) is None


@pytest.mark.parametrize("module", ["shiftproof.benchmark.metrics", "shiftproof.datasets.digits", "shiftproof.benchmark"])
def test_modules_of_the_editable_install_have_one(module: str) -> None:
    assert fingerprint(module) is not None


def test_an_edit_changes_the_fingerprint_and_so_does_a_touch(site: Any) -> None:
    file = site.install("toy", HOOK)
    before = fingerprint("toy_toy")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    touched = fingerprint("toy_toy")
    file.write_text(file.read_text() + "\n")
    assert len({str(stage) for stage in (before, touched, fingerprint("toy_toy"))}) == 3


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize("module", ["pkg", "pkg.plugin"])
def test_a_plugin_in_a_package_of_its_own_changes_with_any_file_of_the_package(site: Any, module: str) -> None:
    for name in ("__init__", "plugin", "sub/helper"):
        write(site.folder / f"pkg/{name}.py", "x = 1")
    before = fingerprint(module)
    write(site.folder / "pkg/sub/helper.py", "x = 10")
    assert fingerprint(module) != before


def test_a_plugin_of_one_file_does_not_change_with_its_neighbours(site: Any) -> None:
    site.install("toy", HOOK)
    before = fingerprint("toy_toy")
    write(site.folder / "neighbour.py", "x = 1")
    assert fingerprint("toy_toy") == before
