"""Content-keyed store for bases, experts and frozen features, safe between processes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shiftproof.benchmark.records import sha256, write_atomically


def cache_folder() -> Path:
    """`SHIFTPROOF_CACHE`, or the user's cache folder on this system."""
    named = os.environ.get("SHIFTPROOF_CACHE")
    return Path(named) if named else Path(platformdirs.user_cache_dir("shiftproof"))


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
        """
        path = self.folder / kind / f"{sha256([kind, key])}.safetensors"
        stored = _read(path)
        if stored is not None:
            return stored
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_suffix(".lock")):
            stored = _read(path)
            if stored is None:
                self.made[kind] += 1
                content = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
                write_atomically(path, safetensors.torch.save(content))
                stored = content
        return dict(stored)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Stored tensors; a file that is damaged counts as absent, since its content can be made again."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None
