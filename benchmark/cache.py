"""Content-keyed store for bases, experts and frozen features, safe between processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shiftproof.benchmark.errors import OutputError
from shiftproof.benchmark.folders import cache_folder
from shiftproof.benchmark.records import sha256, write_atomically


class Cache:
    """Named tensors, made once for each key.

    Attributes:
        made: How often each kind had to be computed by this process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()
        self.made: Counter[str] = Counter()

    def tensors(self, kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors for `key`: read back, or made by one process while the others wait.

        Args:
            kind: Readable folder name, such as "base" or "features".
            key: JSON values that determine the content.
            make: Called without arguments where nothing is stored yet.

        Raises:
            OutputError: If the cache folder cannot be written.
        """
        path = self.folder / kind / f"{sha256([kind, key])}.safetensors"
        stored = _read(path)
        if stored is not None:
            return stored
        with locked(path.with_suffix(".lock")):
            stored = _read(path)
            if stored is None:
                self.made[kind] += 1
                content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in make().items()}
                write_atomically(path, safetensors.torch.save(content))
                stored = content
        return dict(stored)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock between processes; a process that dies lets go of it.

    Raises:
        filelock.Timeout: If another process holds it and `wait` is False.
        OutputError: If the lock file cannot be written.
    """
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        raise
    except OSError as error:
        raise OutputError(
            f"expected to write {path.name} into {path.parent}, got: {error.strerror}; choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> dict[str, Tensor] | None:
    """Stored tensors; a file that is damaged or unreadable counts as absent, since its content can be made again."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
