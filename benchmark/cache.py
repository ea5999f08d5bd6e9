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
from shiftproof.benchmark.experiences import state_sha256
from shiftproof.benchmark.folders import cache_folder
from shiftproof.benchmark.inventory import FACTS, metadata_of
from shiftproof.benchmark.records import canonical, sha256, write_atomically

CONTENT = "shiftproof.sha256"  # key of the metadata under which an entry keeps the hash of its tensors


class NotCachedError(LookupError):
    """A cache that makes nothing was asked for what it does not hold."""


class Cache:
    """Named tensors, made once for each key.

    Attributes:
        makes: What is not stored yet is made; else asking for it is an error.
        made: How often each kind had to be computed by this process.
    """

    def __init__(self, folder: Path | None = None, makes: bool = True) -> None:
        self.folder = folder or cache_folder()
        self.makes = makes
        self.made: Counter[str] = Counter()

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """Where the tensors for `key` lie."""
        return self.folder / kind / f"{sha256([kind, key])}.safetensors"

    def tensors(
        self,
        kind: str,
        key: Mapping[str, Any],
        make: Callable[[], Mapping[str, Tensor]],
        facts: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors for `key`: read back, or made by one process while the others wait.

        Args:
            kind: Readable folder name, such as "base" or "features".
            key: JSON values that determine the content.
            make: Called without arguments where nothing is stored yet.
            facts: JSON values that tell a person what was made; they determine nothing.

        Raises:
            NotCachedError: If nothing is stored yet and this cache makes nothing.
            OutputError: If the cache folder cannot be written.
        """
        path = self.path(kind, key)
        stored = self.stored(kind, key)
        if stored is not None:
            return stored
        if not self.makes:
            raise NotCachedError(f"{kind}/{path.name}")
        with locked(path.with_suffix(".lock")):
            stored = self.stored(kind, key)
            if stored is None:
                self.made[kind] += 1
                stored = self.store(kind, key, make(), facts)
        return dict(stored)

    def stored(self, kind: str, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """The tensors for `key`, None where there are none.

        A file that is damaged, altered or unreadable counts as absent, since its content can be made again.
        """
        path = self.path(kind, key)
        try:
            told, tensors = metadata_of(path).get(CONTENT), safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError):
            return None
        return tensors if told == state_sha256(tensors) else None

    def store(
        self, kind: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Write the tensors for `key`, whatever lies there; returns them as they will be read back.

        Raises:
            OutputError: If the cache folder cannot be written.
        """
        content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"format": "pt", CONTENT: state_sha256(content)}
        if facts is not None:
            metadata[FACTS] = canonical(dict(facts))
        write_atomically(self.path(kind, key), safetensors.torch.save(content, metadata))
        return content


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
