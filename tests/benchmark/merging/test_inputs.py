"""Which files a checkpoint consists of, and where a merge may be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.inputs import check_output, locate, targets, weight_map

INDEX = "model.safetensors.index.json"


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def sharded(folder: Path, shards: dict[str, str]) -> Path:
    """A folder with an index, and empty shards."""
    touch(folder, *(name for name in shards.values() if "/" not in name))
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    return folder


def test_a_file_is_itself(tmp_path: Path) -> None:
    touch(tmp_path, "a.safetensors", "b.pt")
    first, second = locate(tmp_path / "a.safetensors"), locate(tmp_path / "b.pt")
    assert (first.files, first.index, first.is_pytorch) == ((tmp_path / "a.safetensors",), None, False)
    assert second.is_pytorch


def test_an_index_and_its_folder_are_the_same_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"w": "2.safetensors", "v": "1.safetensors", "u": "2.safetensors"})
    for path in (folder, folder / INDEX):
        located = locate(path)
        assert located.files == (folder / "1.safetensors", folder / "2.safetensors")
        assert (located.index, located.label) == (folder / INDEX, str(path))


def test_what_is_not_there_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x.npz")
    touch(tmp_path / "folder", "a.safetensors")
    with pytest.raises(InputError, match="got no such file"):
        locate(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"expected a checkpoint named like .*, got .*x\.npz"):
        locate(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"expected one \*\.safetensors\.index\.json in the folder .*, got 0"):
        locate(tmp_path / "folder")


@pytest.mark.parametrize("shard", ["../1.safetensors", "/etc/1.safetensors", "a\\1.safetensors", "1.bin"])
def test_an_index_leads_to_no_file_elsewhere(tmp_path: Path, shard: str) -> None:
    folder = sharded(tmp_path / "m", {"w": "1.safetensors"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(InputError, match="expected shards named like"):
        locate(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 1}}', '{"weight_map": [1]}'])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: expected"):
        weight_map(tmp_path / INDEX)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"w": "1.safetensors"})
    (folder / "1.safetensors").unlink()
    with pytest.raises(InputError, match=r"expected the shard 1\.safetensors beside it"):
        locate(folder)


def test_an_output_that_exists_needs_force(tmp_path: Path) -> None:
    touch(tmp_path, "base.safetensors", "out.safetensors")
    base = locate(tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"out\.safetensors, which exists; give --force"):
        check_output(tmp_path / "out.safetensors", [base], force=False)
    check_output(tmp_path / "out.safetensors", [base], force=True)
    check_output(tmp_path / "new.safetensors", [base], force=False)


@pytest.mark.parametrize("way", ["same", "dotted", "symbolic", "hard"])
def test_an_output_that_is_an_input_is_refused_even_with_force(tmp_path: Path, way: str) -> None:
    touch(tmp_path, "base.safetensors", "e.safetensors")
    inputs = [locate(tmp_path / "base.safetensors"), locate(tmp_path / "e.safetensors")]
    out = {
        "same": tmp_path / "e.safetensors",
        "dotted": tmp_path / ".." / tmp_path.name / "e.safetensors",
        "symbolic": tmp_path / "link.safetensors",
        "hard": tmp_path / "link.safetensors",
    }[way]
    if way == "symbolic":
        out.symlink_to(tmp_path / "e.safetensors")
    if way == "hard":
        out.hardlink_to(tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="which is one of them"):
        check_output(out, inputs, force=True)


def test_a_link_to_itself_is_a_name_that_exists_and_force_takes_its_place(tmp_path: Path) -> None:
    touch(tmp_path, "base.safetensors")
    out, base = tmp_path / "loop.safetensors", locate(tmp_path / "base.safetensors")
    out.symlink_to(out)
    check_output(out, [base], force=True)
    with pytest.raises(InputError, match="which exists; give --force"):
        check_output(out, [base], force=False)


@pytest.mark.parametrize("name", ["out.pt", "out", "out.safetensors.index.json", "out.json"])
def test_one_file_gives_one_file_with_the_right_ending(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "base.safetensors")
    with pytest.raises(InputError, match=r"expected --out named like merged\.safetensors, got '.*out"):
        check_output(tmp_path / name, [locate(tmp_path / "base.safetensors")], force=False)


def test_shards_give_one_file_or_a_folder(tmp_path: Path) -> None:
    base = locate(sharded(tmp_path / "m", {"w": "1.safetensors", "v": "2.safetensors"}))
    for name in ("out", "out.safetensors"):
        check_output(tmp_path / name, [base], force=False)
    assert targets(tmp_path / "out", base) == [tmp_path / "out" / name for name in ("1.safetensors", "2.safetensors", INDEX)]
    assert targets(tmp_path / "out.safetensors", base) == [tmp_path / "out.safetensors"]
    for name in ("out.safetensors.index.json", "out.pt"):
        with pytest.raises(InputError, match="or a folder for the shards"):
            check_output(tmp_path / name, [base], force=False)


def test_a_folder_with_other_files_takes_shards_and_one_with_the_same_needs_force(tmp_path: Path) -> None:
    base = locate(sharded(tmp_path / "m", {"w": "1.safetensors"}))
    touch(tmp_path / "out", "config.json")
    check_output(tmp_path / "out", [base], force=False)
    touch(tmp_path / "out", INDEX)
    with pytest.raises(InputError, match="give --force"):
        check_output(tmp_path / "out", [base], force=False)
    with pytest.raises(InputError, match="which is one of them"):
        check_output(tmp_path / "m", [base], force=True)


def test_an_output_in_no_folder_or_of_the_other_kind_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "base.safetensors", "out")
    base = locate(tmp_path / "base.safetensors")
    shards = locate(sharded(tmp_path / "m", {"w": "1.safetensors"}))
    with pytest.raises(InputError, match="expected --out in a folder that exists"):
        check_output(tmp_path / "none" / "out.safetensors", [base], force=False)
    with pytest.raises(InputError, match="expected --out as a folder"):
        check_output(tmp_path / "out", [shards], force=True)
    with pytest.raises(InputError, match=r"got .*base\.safetensors/o\.safetensors, where .*base\.safetensors is a file"):
        check_output(tmp_path / "base.safetensors" / "o.safetensors", [base], force=False)
    with pytest.raises(InputError, match=r"expected --out named like merged\.safetensors, got '\.'"):
        check_output(Path(), [base], force=False)
    touch(tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="expected --out as a file"):
        check_output(tmp_path / "out.safetensors", [base], force=True)
