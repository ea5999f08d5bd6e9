"""Where a number came from, without paths, users or hosts."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from shiftproof.benchmark import provenance
from shiftproof.benchmark.provenance import Provenance, command_line, peak_memory_mb, without_paths
from shiftproof.leaderboards import __file__ as leaderboards

PORTABLE = json.loads((Path(leaderboards).parent / "schema.json").read_text())["$defs"]["portable_text"]["not"]["pattern"]
HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/opt/env/bin/shiftproof", "run", "quick", "--jobs", "2"], "shiftproof run quick --jobs 2"),
        (["shiftproof", "run", "../my suites/a.toml", "--out", "/data/me/runs/"], "shiftproof run a.toml --out runs"),
        (["shiftproof", "--set", "base.file=/data/some one/base.safetensors"], "shiftproof --set base.file=base.safetensors"),
        (
            ["shiftproof", "--set", "stream.p_corr=0.9", "--out=C:\\Users\\Some One\\runs"],
            "shiftproof --set stream.p_corr=0.9 --out=runs",
        ),
        (["shiftproof", "run", "--data-root", HOME, f"--out={HOME}/"], "shiftproof run --data-root ~ --out=~"),
        (["shiftproof", "run", "--plugin", "my_method.py"], "shiftproof run --plugin my_method.py"),
    ],
)
def test_a_command_keeps_the_last_part_of_every_path(arguments: list[str], expected: str) -> None:
    assert command_line(arguments) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Errno 2] No such file: '/home/some one/x.npz'", "[Errno 2] No such file: 'x.npz'"),
        ('File "/opt/env/lib/torch/nn.py", line 3', 'File "nn.py", line 3'),
        ("cannot read /data/a/b.bin: truncated", "cannot read b.bin: truncated"),
        ("(/data/a, ~/b/c, ~me/d)", "(a, c, d)"),
        ("file:///home/me/x and C:\\Users\\me\\y", "file:x and y"),
        ("`/srv/data/`", "`data`"),
        (f"in {HOME}", "in ~"),
        ("expected (N, C) / 3, got a/b and 3/4", "expected (N, C) / 3, got a/b and 3/4"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
    ],
)
def test_a_message_keeps_the_last_part_of_every_absolute_path(text: str, expected: str) -> None:
    assert without_paths(text) == expected
    assert re.search(PORTABLE, expected) is None


def test_a_block_says_what_ran_where_with_what_and_nothing_about_who() -> None:
    block = Provenance("shiftproof.benchmark.running.runner", "shiftproof run quick").block(2, [0, 3])
    assert block["packages"]["torch"] == version("torch")
    assert block["packages"]["shiftproof"] == version("shiftproof")
    assert block["python"] == platform.python_version()
    assert (block["threads"], block["attempts"], block["resumed_from"]) == (torch.get_num_threads(), 2, [0, 3])
    assert block["started"] <= block["finished"]
    text = json.dumps(block)
    assert re.search(PORTABLE, text) is None
    assert os.getcwd() not in text
    if len(platform.node()) > 3:
        assert platform.node() not in text
    if len(getpass.getuser()) > 4:
        assert getpass.getuser() not in text


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of its own with the module `checked_out` in it, imported."""
    (tmp_path / "checked_out.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "checked_out.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.syspath_prepend(str(tmp_path))
    invalidate_caches()
    __import__("checked_out")
    provenance._git.cache_clear()
    yield tmp_path
    del sys.modules["checked_out"]
    provenance._git.cache_clear()


def test_the_commit_is_that_of_the_checkout_with_the_strategy(checkout: Path) -> None:
    block = Provenance("checked_out", "").block(1, [])
    assert block["git_commit"] == git(checkout, "rev-parse", "HEAD")
    assert block["git_dirty"] is False


def test_an_edited_checkout_is_dirty_and_untracked_files_do_not_make_it_so(checkout: Path) -> None:
    (checkout / "untracked.txt").write_text("x")
    assert Provenance("checked_out", "").block(1, [])["git_dirty"] is False
    provenance._git.cache_clear()
    (checkout / "checked_out.py").write_text("x = 2\n")
    assert Provenance("checked_out", "").block(1, [])["git_dirty"] is True


def test_a_file_that_is_not_tracked_has_no_commit(checkout: Path) -> None:
    git(checkout, "rm", "-q", "--cached", "checked_out.py")
    block = Provenance("checked_out", "").block(1, [])
    assert (block["git_commit"], block["git_dirty"]) == (None, None)


@pytest.mark.parametrize("module", ["__main__", "no_such_module", "builtins"])
def test_a_module_without_a_checkout_has_no_commit_and_is_no_error(module: str) -> None:
    assert Provenance(module, "").block(1, [])["git_dirty"] in (None, True, False)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_mb(torch.device("cpu"))
    held = torch.ones(64, 2**20)  # 256 MiB
    assert peak_memory_mb(torch.device("cpu")) >= before
    assert peak_memory_mb(torch.device("cpu")) > held.nbytes / 2**20
