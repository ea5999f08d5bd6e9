"""Headers against the format's own library, and every way in which a file can be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.safetensors_files import DTYPES, header_bytes, read_header

Header = dict[str, Any]


def test_a_header_tells_what_the_library_tells(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {f"t-{name}": torch.zeros(3, 2).to(dtype) for name, dtype in DTYPES.items()}
    save_file({**tensors, "": torch.rand(1), "empty": torch.zeros(0, 4), "ö": torch.tensor(2.0)}, file, {"a": "b"})
    entries, metadata = read_header(file)
    with safe_open(file, "pt") as opened:
        assert set(entries) == set(opened.keys())
        assert metadata == opened.metadata()
        for name, entry in entries.items():
            tensor = opened.get_tensor(name)
            assert (entry.dtype, entry.shape, entry.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
    content = file.read_bytes()
    begin = entries["ö"].offset
    assert torch.frombuffer(bytearray(content[begin : begin + 4]), dtype=torch.float32).item() == 2.0


def test_a_written_header_is_the_librarys_up_to_its_order(tmp_path: Path) -> None:
    tensors = {"b": torch.rand(3), "a": torch.rand(2, 2)}
    theirs = save(tensors, {"k": "v"})
    names = sorted(tensors)
    head, starts = header_bytes([(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names], {"k": "v"})
    assert int.from_bytes(head[:8], "little") == len(head) - 8
    assert json.loads(head[8:]) == json.loads(theirs[8 : len(theirs) - 28])
    assert starts == [len(head), len(head) + 16]
    assert len(head) % 8 == 0


def change(file: Path, edit: Callable[[Header], Any]) -> None:
    """Write the file again with another header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header["w"].update(data_offsets=[0, 20]),
        lambda header: header["w"].update(data_offsets=[4, 28]),
        lambda header: header["w"].update(data_offsets=[-4, 20]),
        lambda header: header["w"].update(data_offsets=[0]),
        lambda header: header["w"].update(data_offsets=["0", "24"]),
        lambda header: header["w"].update(shape=[2, 4]),
        lambda header: header["w"].update(shape=[-2, -3]),
        lambda header: header["w"].update(shape=6),
        lambda header: header["w"].update(extra=1),
        lambda header: header["w"].pop("dtype"),
        lambda header: header.update(w=[1]),
        lambda header: header.update(v={"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}),
        lambda header: header.pop("w"),
        lambda header: header.update(__metadata__={"a": 1}),
        lambda header: header.update(__metadata__=[1]),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, edit: Callable[[Header], Any]) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.rand(2, 3)}, file)
    read_header(file)
    change(file, edit)
    with pytest.raises(InputError, match=r"x\.safetensors: expected a complete safetensors file, got"):
        read_header(file)


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.rand(2, 3)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"expected a complete safetensors file"):
        read_header(file)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 40,
        (9).to_bytes(8, "little") + b"\xff" * 9,
        (4).to_bytes(8, "little") + b"null",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_other_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"expected a complete safetensors file"):
        read_header(file)


def test_a_dtype_that_torch_cannot_hold_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.rand(2, 3)}, file)
    change(file, lambda header: header["w"].update(dtype="F4"))
    with pytest.raises(InputError, match=r"for 'w', got 'F4'"):
        read_header(file)
