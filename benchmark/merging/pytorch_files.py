"""What `torch.save` wrote: where in the file each tensor lies, without executing anything and without reading the tensors."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.safetensors_files import Entry

WRAPPERS = ("state_dict", "model")  # keys under which trainers keep the state dict beside an optimizer or a counter
_LOCAL_HEADER = 30  # bytes before the name in a zip archive's header of a file


@dataclass(frozen=True, eq=False)
class StateDictFile:
    """What a file of PyTorch holds.

    Attributes:
        entries: Where each tensor lies in the file.
        loaded: The tensors themselves where the file does not tell: it is older than torch 1.6, or another program packed it.
        wrapper: The keys under which the state dict was found, such as "model.state_dict"; empty where the file is one.
        skipped: What was passed over, name to reason.
    """

    entries: Mapping[str, Entry]
    loaded: Mapping[str, Tensor]
    wrapper: str
    skipped: Mapping[str, str]


def read_pytorch(path: Path) -> StateDictFile:
    """Find the tensors of a checkpoint.

    Raises:
        InputError: If the pickle would execute code, the file is damaged, or no state dict is in it.
    """
    return _in_place(path) or StateDictFile({}, *_state_of(_load(path, "cpu"), path))


def _in_place(path: Path) -> StateDictFile | None:
    records = _records(path)
    if not records:
        return None
    try:
        state, wrapper, skipped = _state_of(_load(path, "meta"), path)
    except InputError:  # a sparse tensor, too, which has no place on that device; loading it as a whole tells
        return None
    entries = {name: _entry(tensor, records) for name, tensor in state.items()}
    known = {name: entry for name, entry in entries.items() if entry is not None}
    return StateDictFile(known, {}, wrapper, skipped) if len(known) == len(state) else None


def _load(path: Path, device: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse tensors, which are passed over, take long to check
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        called = re.search(r"(?:GLOBAL|global:?|class:?) (\w+(?:\.\w+)+)", str(error))
        what = f"a pickle that would run {called[1]}" if called else "a pickle that is damaged or would run code"
        raise InputError(f"{path}: expected tensors alone, got {what}; save its state_dict() instead") from None
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, OSError) as error:
        # TorchScript is told apart by its message alone; what damaged bytes lead to is of no use to anybody.
        what = "a TorchScript archive" if "TorchScript" in str(error) else "one that is cut short or damaged"
        raise InputError(f"{path}: expected a file written by torch.save(model.state_dict()), got {what}") from None


def _state_of(loaded: Any, path: Path) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """The state dict within what was saved, where it was, and what lies beside it."""
    skipped: dict[str, str] = {}
    wrappers = []
    while isinstance(loaded, Mapping) and (wrapper := _wrapper(loaded)):
        skipped |= {str(name): f"beside {wrapper!r}" for name in loaded if name != wrapper}
        loaded = loaded[wrapper]
        wrappers.append(wrapper)
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: expected a state dict, got {type(loaded).__name__}; save model.state_dict()")
    tensors = {str(name): value.detach() for name, value in loaded.items() if _is_dense(value)}
    if not tensors:
        held = ", ".join(map(str, list(loaded)[:3])) or "nothing"
        raise InputError(f"{path}: expected a state dict of tensors, or one under {' or '.join(WRAPPERS)}, got {held}")
    return (
        tensors,
        ".".join(wrappers),
        skipped | {str(name): "no dense tensor" for name, value in loaded.items() if not _is_dense(value)},
    )


def _wrapper(loaded: Mapping[Any, Any]) -> str:
    """The key of a dictionary within; empty where the tensors lie here."""
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return ""
    return next((name for name in WRAPPERS if isinstance(loaded.get(name), Mapping)), "")


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _records(path: Path) -> dict[int, int]:
    """Where the bytes of each file in the archive begin, and how many they are; empty where they cannot be used as they lie."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = archive.infolist()
            order = [archive.read(info) for info in infos if info.filename.endswith("/byteorder")]
            if order not in ([], [b"little"]) or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                return {}
            return {_begin(file, info): info.file_size for info in infos}
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return {}  # older than the archives, or damaged: torch.load knows


def _begin(file: Any, info: zipfile.ZipInfo) -> int:
    """The archive's directory has its own copy of name and extra field, whose lengths may differ from those before the data."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    return (
        info.header_offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    )


def _entry(tensor: Tensor, records: Mapping[int, int]) -> Entry | None:
    """Where a tensor on the meta device lies; None where torch does not say, or says what the archive does not hold."""
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None or records.get(begin) != storage.nbytes():
        return None
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Entry(tensor.dtype, tuple(tensor.shape), begin + tensor.storage_offset() * tensor.dtype.itemsize, strides)
