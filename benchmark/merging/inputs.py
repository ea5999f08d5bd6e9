"""Where a checkpoint lies: one safetensors file, the shards of an index, or one PyTorch file. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.paths import check_parent, is_same
from shiftproof.benchmark.records import parse_json

SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
PYTORCH = (".pt", ".pth", ".bin", ".ckpt")
KNOWN = f"*{SAFETENSORS}, *{INDEX}, a folder with such an index, or {', '.join('*' + suffix for suffix in PYTORCH)}"


@dataclass(frozen=True)
class Located:
    """A checkpoint on disk.

    Attributes:
        path: As it was named: a file, an index, or a folder.
        files: What holds its tensors, in the order of their names; one file unless it is sharded.
        index: The index of the shards; None for one file.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None

    @property
    def label(self) -> str:
        """What errors call it."""
        return str(self.path)

    @property
    def every_file(self) -> tuple[Path, ...]:
        """What is read: the files that hold tensors, and the index."""
        return (*self.files, *([self.index] if self.index else []))

    @property
    def is_pytorch(self) -> bool:
        """Whether it was written by `torch.save`."""
        return self.files[0].suffix in PYTORCH


def locate(path: Path) -> Located:
    """Find the files of a checkpoint.

    Args:
        path: A file, an index, or a folder with one index.

    Raises:
        InputError: If it or one of its shards is not there, or it is of another kind.
    """
    if path.is_dir():
        indexes = sorted(path.glob(f"*{INDEX}"))
        if len(indexes) != 1:
            raise InputError(f"expected one *{INDEX} in the folder {path}, got {len(indexes)}; name a file instead")
        return Located(path, shards_of(indexes[0]), indexes[0])
    if not path.is_file():
        raise InputError(f"expected a checkpoint in {path}, got no such file")
    if path.name.endswith(INDEX):
        return Located(path, shards_of(path), path)
    if path.suffix not in (SAFETENSORS, *PYTORCH):
        raise InputError(f"expected a checkpoint named like {KNOWN}, got {path}")
    return Located(path, (path,))


def shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names.

    Raises:
        InputError: If the index is damaged, names a file outside its folder, or one that is not there.
    """
    shards = sorted(set(weight_map(index).values()))
    for shard in shards:
        if "/" in shard or "\\" in shard or not shard.endswith(SAFETENSORS):
            raise InputError(f"{index}: expected shards named like part-1{SAFETENSORS} beside it, got {shard!r}")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index}: expected the shard {shard} beside it, got no such file")
    return tuple(index.parent / shard for shard in shards)


def weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor to the file that holds it.

    Raises:
        InputError: If the index cannot be read or is no such map.
    """
    found = index_content(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise InputError(f"{index}: expected a 'weight_map' from names of tensors to files, got none")
    return found


def index_content(index: Path) -> dict[str, object]:
    """Everything that an index says. Raises InputError if it cannot be read."""
    try:
        text = index.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{index}: expected an index in JSON, got: {error}") from error
    return parse_json(text, str(index))


def check_output(out: Path, inputs: Sequence[Located], force: bool) -> None:
    """Refuse, before anything is read, an output that cannot be or must not be written.

    A base of one file gives one file, named *.safetensors. A sharded base gives either that, or a folder with its shards and
    its index under the same names; what else lies in the folder is left alone.

    Raises:
        InputError: If the output is an input, exists without `force`, lies in no folder, or its name does not say what it is.
    """
    check_parent("--out", out)
    base = inputs[0]
    if out.suffix != SAFETENSORS and (base.index is None or out.suffix in (".json", *PYTORCH)):
        also = ", or a folder for the shards" if base.index else ""
        raise InputError(f"expected --out named like merged{SAFETENSORS}{also}, got {str(out)!r}")
    if out.is_dir() == (out.suffix == SAFETENSORS) and out.exists():
        raise InputError(f"expected --out as a {'file' if out.is_dir() else 'folder'}, got {out}, which is something else")
    written = targets(out, base)
    sources = [file for item in inputs for file in item.every_file]
    for file in written:
        if any(is_same(file, source) for source in sources):
            raise InputError(f"expected --out apart from the inputs, got {file}, which is one of them; rename it")
    existing = [file for file in written if file.exists() or file.is_symlink()]
    if existing and not force:
        raise InputError(f"expected a new file for --out, got {existing[0]}, which exists; give --force to replace it")


def targets(out: Path, base: Located) -> list[Path]:
    """The files that a merge into `out` writes; of a folder the index comes last."""
    if out.suffix == SAFETENSORS or base.index is None:
        return [out]
    return [out / file.name for file in (*base.files, base.index)]
