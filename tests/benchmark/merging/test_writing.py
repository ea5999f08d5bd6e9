"""All of an output under its name, or nothing anywhere."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shiftproof.benchmark.errors import OutputError
from shiftproof.benchmark.merging.checkpoints import Checkpoint, opened
from shiftproof.benchmark.merging.inputs import locate
from shiftproof.benchmark.merging.writing import RECIPE, Output

State = dict[str, Tensor]
Saved = Callable[..., list[Path]]
INDEX = "m.safetensors.index.json"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(params=["nameless", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With files that have no name until they are finished, and on a system without those."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


@pytest.fixture
def base(states: Any, saved: Saved) -> Iterator[Checkpoint]:
    with opened([locate(saved(states(0))[0])]) as (checkpoint,):
        yield checkpoint


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Checkpoint]:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a": torch.rand(3)}, folder / "1.safetensors", {"which": "first"})
    save_file({"b": torch.rand(2, 2), "c": torch.arange(3)}, folder / "2.safetensors", {"which": "second"})
    where = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0, "kept": True}, "weight_map": where}))
    with opened([locate(folder)]) as (checkpoint,):
        yield checkpoint


def fill(output: Output, base: Checkpoint) -> None:
    for name in base.names():
        output.write(name, base.read(name))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("force", [True, False])
def test_what_was_written_is_what_the_library_reads(base: Checkpoint, tmp_path: Path, way: str, force: bool) -> None:
    out = tmp_path / "out.safetensors"
    with Output(out, base, "xx", force) as output:
        fill(output, base)
        output.write_part("fc.bias", 2, torch.tensor([5.0, 6.0]))
        assert output.commit("{}") == [out]
    wanted = load_file(base.located.files[0])
    wanted["fc.bias"][2:4] = torch.tensor([5.0, 6.0])
    found = load_file(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with safe_open(out, "pt") as opened_file:
        assert opened_file.metadata() == {"format": "pt", "who": "base", RECIPE: "{}"}
    assert listing(tmp_path) == ["base.safetensors", "out.safetensors"]


def test_files_may_be_read_by_whom_the_mask_allows(base: Checkpoint, tmp_path: Path, way: str) -> None:
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain"
    plain.write_bytes(b"")
    with Output(out, base, "x") as output:
        output.commit("y")
    assert out.stat().st_mode == plain.stat().st_mode


def test_a_pytorch_base_gives_aligned_tensors(tmp_path: Path, saved: Saved) -> None:
    state = {
        "byte": torch.ones(3, dtype=torch.uint8),
        "double": torch.rand(2, dtype=torch.float64),
        "half": torch.rand(3).half(),
    }
    (file,) = saved([state], ".pt")
    with opened([locate(file)]) as (base,), Output(tmp_path / "out.safetensors", base, "x") as output:
        fill(output, base)
        output.commit("y")
        starts = output.parts[0].starts
    assert all(start % state[name].dtype.itemsize == 0 for name, start in starts.items())
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_leaving_without_commit_leaves_nothing(base: Checkpoint, tmp_path: Path, way: str) -> None:
    before = listing(tmp_path)
    with Output(tmp_path / "out.safetensors", base, "x") as output:
        fill(output, base)
    assert listing(tmp_path) == before


def test_a_file_that_appears_meanwhile_is_not_replaced(base: Checkpoint, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out.safetensors"
    with Output(out, base, "x") as output:
        out.write_text("somebody else's")
        with pytest.raises(OutputError, match=r"got: .*; give --force"):
            output.commit("y")
    assert out.read_text() == "somebody else's"
    assert listing(tmp_path) == ["base.safetensors", "out.safetensors"]


def test_force_replaces_a_link_and_not_what_it_leads_to(base: Checkpoint, tmp_path: Path, way: str) -> None:
    out, other = tmp_path / "out.safetensors", tmp_path / "other"
    other.write_text("kept")
    out.symlink_to(other)
    with Output(out, base, "x", force=True) as output:
        output.commit("y")
    assert other.read_text() == "kept"
    assert not out.is_symlink()


def test_a_disk_without_room_is_noticed_before_the_merge_and_leaves_nothing(base: Checkpoint, tmp_path: Path, way: str) -> None:
    with largest_file(1000), pytest.raises(OutputError, match=r"expected to write out\.safetensors into .*; free space"):
        Output(tmp_path / "out.safetensors", base, "x")
    assert listing(tmp_path) == ["base.safetensors"]


@pytest.mark.parametrize("moment", ["write", "commit"])
def test_a_disk_that_fails_later_leaves_nothing(base: Checkpoint, tmp_path: Path, way: str, moment: str) -> None:
    acts: dict[str, Callable[[Output], Any]] = {
        "write": lambda output: fill(output, base),
        "commit": lambda output: output.commit("y"),
    }
    with (
        Output(tmp_path / "out.safetensors", base, "x") as output,
        largest_file(0),
        pytest.raises(OutputError, match="too large"),
    ):
        acts[moment](output)
    assert listing(tmp_path) == ["base.safetensors"]


def test_shards_keep_their_names_metadata_and_index(shards: Checkpoint, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    with Output(out, shards, "x") as output:
        fill(output, shards)
        files = output.commit("y")
    assert files == [out / "1.safetensors", out / "2.safetensors", out / INDEX]
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"] == {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    assert index["metadata"] == {"total_size": 3 * 4 + 4 * 4 + 3 * 8, "kept": True}
    for file, which in ((files[0], "first"), (files[1], "second")):
        wanted = load_file(tmp_path / "m" / file.name)
        assert all(torch.equal(wanted[name], tensor) for name, tensor in load_file(file).items())
        with safe_open(file, "pt") as opened_file:
            assert opened_file.metadata() == {"which": which, RECIPE: "y"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_shards_may_become_one_file(shards: Checkpoint, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out.safetensors"
    with Output(out, shards, "x") as output:
        fill(output, shards)
        assert output.commit("y") == [out]
    found = load_file(out)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"a": (3,), "b": (2, 2), "c": (3,)}
    assert torch.equal(found["c"], torch.arange(3))


def test_shards_in_a_folder_that_exists_leave_other_files_alone(shards: Checkpoint, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "1.safetensors", INDEX):
        (out / name).write_text("old")
    with Output(out, shards, "x", force=True) as output:
        fill(output, shards)
        output.commit("y")
    assert (out / "config.json").read_text() == "old"
    assert torch.equal(load_file(out / "1.safetensors")["a"], shards.read("a"))
    assert sorted(path.name for path in out.iterdir()) == ["1.safetensors", "2.safetensors", "config.json", INDEX]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_shards_that_cannot_be_finished_leave_no_folder(shards: Checkpoint, tmp_path: Path, way: str) -> None:
    with Output(tmp_path / "out", shards, "x") as output:
        fill(output, shards)
        (tmp_path / "out").write_text("somebody else's")
        with pytest.raises(OutputError):
            output.commit("y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]
