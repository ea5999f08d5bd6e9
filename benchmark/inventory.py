"""What lies in the cache, as its files say. Nothing here imports torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FACTS = "shiftproof.made"  # key of the metadata under which an entry says what it is
EXPERT = "expert"  # kind of experts in the cache


@dataclass(frozen=True)
class CachedExpert:
    """An expert in the cache.

    Attributes:
        cache_key: Hash of the key, which is the name of its file.
        size: Of the file, in bytes.
        stream: The stream that it was first made for, by the name under which it is registered.
        version: Of that stream.
        set: What was set for that stream, "scope.key=value".
        experience: What it was fine-tuned on.
        key: What determines it: hashes of base, data and code, recipe, seed, device, torch.
    """

    cache_key: str
    size: int
    stream: str
    version: str
    set: tuple[str, ...]
    experience: str
    seed: int
    key: dict[str, Any]


def cached_experts(folder: Path) -> tuple[list[CachedExpert], int]:
    """Every expert in a cache folder that says what it is, sorted by stream, seed and name; and how many do not.

    A file that is damaged counts as absent, as it does for a run.
    """
    experts, unnamed = [], 0
    for path in sorted((folder / EXPERT).glob("*.safetensors")):
        try:
            size, metadata = path.stat().st_size, metadata_of(path)
        except (OSError, SafetensorError):
            continue
        told = _facts(metadata.get(FACTS, ""))
        try:
            experts.append(CachedExpert(path.stem, size, **{**told, "set": tuple(told.get("set", ()))}))
        except TypeError:  # of another version, or none
            unnamed += 1
    experts.sort(key=lambda one: (one.stream, one.set, one.seed, one.experience, one.cache_key))
    return experts, unnamed


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors. Raises OSError or SafetensorError where it cannot be read."""
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _facts(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
