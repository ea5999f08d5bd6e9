"""The content-keyed cache: made once, whoever asks, and never half."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from shiftproof.benchmark.cache import Cache, NotCachedError, locked
from shiftproof.benchmark.errors import OutputError
from shiftproof.benchmark.inventory import FACTS


def make() -> Mapping[str, Tensor]:
    return {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5), "empty": torch.zeros(0, 4)}


def never() -> Mapping[str, Tensor]:
    raise AssertionError("made again")


def test_what_was_made_is_read_back_equal_by_another_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first = cache.tensors("kind", {"k": [1, "a"]}, make)
    again = Cache(tmp_path).tensors("kind", {"k": [1, "a"]}, never)
    assert cache.made == {"kind": 1}
    for tensors in (first, again):
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {n: t.tolist() for n, t in make().items()}
        assert [tensors[name].dtype for name in make()] == [tensor.dtype for tensor in make().values()]


def test_another_key_or_kind_is_another_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for kind, key in (("kind", {"k": 1}), ("kind", {"k": 2}), ("other", {"k": 1})):
        cache.tensors(kind, key, make)
    assert cache.made == {"kind": 2, "other": 1}
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_what_is_returned_does_not_share_memory_with_what_made_it(tmp_path: Path) -> None:
    source = torch.zeros(3)
    made = Cache(tmp_path).tensors("kind", {}, lambda: {"a": source, "tied": source})
    source += 1
    assert made["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"not a safetensors file at all",
        lambda content: content[:-5],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),  # a valid file with one bit of a tensor turned over
        lambda content: safetensors.torch.save({"b": torch.tensor(2.5)}),
    ],
    ids=["empty", "other", "cut", "bit", "stranger"],
)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    Cache(tmp_path).tensors("kind", {}, make)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    cache = Cache(tmp_path)
    assert cache.tensors("kind", {}, make)["b"] == 1.5
    assert cache.made == {"kind": 1}
    assert Cache(tmp_path).tensors("kind", {}, never)["b"] == 1.5


def test_making_that_fails_leaves_nothing_behind_and_lets_go_of_the_lock(tmp_path: Path) -> None:
    def fail() -> Mapping[str, Tensor]:
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        Cache(tmp_path).tensors("kind", {}, fail)
    assert [path.suffix for path in tmp_path.rglob("*.*")] in ([], [".lock"])
    assert Cache(tmp_path).tensors("kind", {}, make)["b"] == 1.5


RACER = """
import sys, time, torch
from pathlib import Path
from shiftproof.benchmark.cache import Cache

folder = Path(sys.argv[1])

def make():
    with open(folder / "made", "a") as file:
        file.write("x")
    time.sleep(0.5)
    return {"a": torch.ones(2)}

(folder / f"ready-{sys.argv[2]}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.001)
print(Cache(folder).tensors("kind", {}, make)["a"].tolist())
"""


def test_a_cache_that_makes_nothing_tells_what_is_not_there(tmp_path: Path) -> None:
    looking = Cache(tmp_path, makes=False)
    with pytest.raises(NotCachedError, match=r"kind/[0-9a-f]{64}\.safetensors"):
        looking.tensors("kind", {}, never)
    assert looking.stored("kind", {}) is None
    Cache(tmp_path).tensors("kind", {}, make)
    assert looking.tensors("kind", {}, never)["b"] == 1.5
    assert looking.made == {}


def test_facts_lie_in_the_file_and_are_no_part_of_the_key(tmp_path: Path) -> None:
    Cache(tmp_path).tensors("kind", {"k": 1}, make, {"stream": "tiny"})
    path = Cache(tmp_path).path("kind", {"k": 1})
    with safe_open(path, "pt") as file:
        assert file.metadata()[FACTS] == '{"stream":"tiny"}'
    assert Cache(tmp_path).tensors("kind", {"k": 1}, never, {"stream": "other"})["b"] == 1.5


def test_two_processes_that_race_make_an_entry_once(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    assert [racer.communicate(timeout=120)[0].strip() for racer in racers] == ["[1.0, 1.0]"] * 2
    assert (tmp_path / "made").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"expected to write .* got: .*; choose another folder"):
        Cache(tmp_path / "file").tensors("kind", {}, make)


def test_a_lock_that_is_held_is_waited_for_or_reported(tmp_path: Path) -> None:
    with locked(tmp_path / "a.lock"), pytest.raises(TimeoutError), locked(tmp_path / "a.lock", wait=False):
        raise AssertionError("held twice")
    with locked(tmp_path / "a.lock", wait=False):
        assert (tmp_path / "a.lock").exists()
