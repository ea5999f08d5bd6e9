"""Where tensors lie in what `torch.save` wrote, and that nothing in it is executed."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.checkpoints import opened
from shiftproof.benchmark.merging.inputs import locate
from shiftproof.benchmark.merging.pytorch_files import read_pytorch

State = dict[str, Tensor]


def tensors() -> State:
    whole = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    return {
        "whole": whole,
        "rows": whole[2:4],
        "turned": whole.t(),
        "strided": whole[::2, 1::3],
        "half": torch.rand(5).to(torch.bfloat16),
        "counter": torch.tensor(7),
        "none": torch.empty(0, 3),
        "channels-last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.rand(3)),
    }


def check_reads(file: Path, wanted: State) -> None:
    with opened([locate(file)]) as (checkpoint,):
        assert set(checkpoint.names()) == set(wanted)
        for name, tensor in wanted.items():
            assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert torch.equal(checkpoint.read(name), tensor)
            part = torch.empty(min(2, tensor.numel()), dtype=tensor.dtype)
            checkpoint.read_into(name, tensor.numel() - len(part), part)
            assert torch.equal(part, tensor.reshape(-1)[tensor.numel() - len(part) :])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_tensors_and_views_are_read_where_they_lie(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    torch.save(tensors(), file)
    found = read_pytorch(file)
    assert not found.loaded
    check_reads(file, torch.load(file, weights_only=True))


def test_a_file_older_than_the_archives_is_loaded_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    wanted = tensors()
    torch.save(wanted, file, _use_new_zipfile_serialization=False)
    assert set(read_pytorch(file).loaded) == set(wanted)
    check_reads(file, wanted)


def test_an_archive_that_was_compressed_again_is_loaded_as_a_whole(tmp_path: Path) -> None:
    file, other = tmp_path / "x.pt", tmp_path / "y.pt"
    wanted = tensors()
    torch.save(wanted, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    assert set(read_pytorch(other).loaded) == set(wanted)
    check_reads(other, wanted)


def test_an_archive_whose_files_were_moved_is_read_right(tmp_path: Path) -> None:
    file, other = tmp_path / "x.pt", tmp_path / "y.pt"
    wanted = tensors()
    torch.save(wanted, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as new:
        for info in reversed(old.infolist()):
            new.writestr(info.filename, old.read(info))
    check_reads(other, wanted)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_state_dict_beside_other_things_is_taken_and_they_are_named(tmp_path: Path, wrapper: str) -> None:
    file = tmp_path / "x.pt"
    torch.save({"epoch": 3, wrapper: OrderedDict(w=torch.ones(2)), "optimizer": {"state": {0: torch.ones(2)}}}, file)
    found = read_pytorch(file)
    assert (list(found.entries), found.wrapper) == (["w"], wrapper)
    assert found.skipped == {"epoch": f"beside '{wrapper}'", "optimizer": f"beside '{wrapper}'"}


def test_wrappers_may_lie_in_each_other_and_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"model": {"state_dict": {"w": torch.ones(2), "note": "hello", "sparse": torch.ones(2).to_sparse()}}}, file)
    found = read_pytorch(file)
    assert found.wrapper == "model.state_dict"
    assert found.skipped == {"note": "no dense tensor", "sparse": "no dense tensor"}


def test_a_tensor_called_model_is_no_wrapper(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"model": torch.ones(2), "w": torch.ones(3)}, file)
    assert set(read_pytorch(file).entries) == {"model", "w"}


class Harmful:
    """Runs a command when a pickle of it is loaded without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("as_archive", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, as_archive: bool) -> None:
    file, trace = tmp_path / "x.pt", tmp_path / "trace"
    torch.save({"w": torch.ones(2), "x": Harmful(trace)}, file, _use_new_zipfile_serialization=as_archive)
    with pytest.raises(InputError, match=r"x\.pt: expected tensors alone, got a pickle that would run posix\.system"):
        read_pytorch(file)
    assert not trace.exists()


def test_a_whole_module_is_refused_with_its_class(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(nn.Linear(2, 2), file)
    with pytest.raises(InputError, match=r"would run torch\.nn\.modules\.linear\.Linear; save its state_dict\(\) instead"):
        read_pytorch(file)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 50])
def test_other_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.pt: expected .*, got "):
        read_pytorch(file)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(tensors(), file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(InputError, match="cut short or damaged"):
        read_pytorch(file)


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"epoch": 3}, {"model": {}}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "x.pt"
    torch.save(content, file)
    with pytest.raises(InputError, match="expected a state dict"):
        read_pytorch(file)
