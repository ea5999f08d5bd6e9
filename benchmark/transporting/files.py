"""Alignments in files: permutations as safetensors, and in the metadata what they were found for and how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import StateDict, state_sha256
from shiftproof.benchmark.records import canonical, parse_json, write_atomically
from shiftproof.benchmark.transporting.alignment import Alignment, Search
from shiftproof.benchmark.transporting.specification import PermutationSpec

KEY = "shiftproof.alignment"  # of the metadata


def identity_of(source: StateDict, target: StateDict) -> dict[str, str]:
    """What an alignment was found for: hashes of the tensors of both releases, whatever files they lie in."""
    return {"source_base": state_sha256(source), "target_base": state_sha256(target)}


def save_alignment(path: Path, alignment: Alignment, facts: Mapping[str, Any]) -> None:
    """Write an alignment, all of it or nothing.

    Args:
        facts: JSON values that say how it was found; with those of `identity_of`.

    Raises:
        OutputError: If the file cannot be written.
    """
    search = {"objective": list(alignment.search.objective), "converged": alignment.search.converged}
    text = canonical({**facts, "search": search})
    tensors = {name: units.clone() for name, units in alignment.permutations.items()}
    write_atomically(path, safetensors.torch.save(tensors, {KEY: text}))


def load_alignment(path: Path, specification: PermutationSpec, identity: Mapping[str, str]) -> tuple[Alignment, dict[str, Any]]:
    """The alignment in a file, and how it was found.

    Args:
        identity: Of the two releases at hand, from `identity_of`.

    Raises:
        InputError: If the file cannot be read, is no alignment, or is one of other models.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            permutations = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"expected an alignment in {path}, got: {error}; --save-alignment writes one") from error
    if KEY not in metadata:
        raise InputError(f"expected an alignment in {path}, got a file without one; --save-alignment writes one")
    facts = parse_json(metadata[KEY], str(path))
    for role, sha256 in identity.items():
        if facts.get(role) != sha256:
            words = role.replace("_", " ")
            raise InputError(f"{path}: expected an alignment made for this {words}, got one made for another; align again")
    _check(path, specification, permutations)
    search = facts.get("search") or {}
    return Alignment(
        specification, permutations, Search(tuple(search.get("objective", ())), bool(search.get("converged")))
    ), facts


def _check(path: Path, specification: PermutationSpec, permutations: StateDict) -> None:
    if permutations.keys() != specification.sizes.keys():
        odd = sorted(permutations.keys() ^ specification.sizes.keys())
        raise InputError(f"{path}: expected the permutations of this architecture, got others: {', '.join(odd[:3])}")
    for name, units in permutations.items():
        size = specification.sizes[name]
        if units.dtype != torch.int64 or not units.sort().values.equal(torch.arange(size)):
            raise InputError(f"{path}: expected {name!r} as a permutation of {size} units, got something else")


def sha256_of_permutations(alignment: Alignment) -> str:
    """Hash over all permutations."""
    digest = hashlib.sha256()
    for name, units in sorted(alignment.permutations.items()):
        digest.update(name.encode())
        digest.update(units.contiguous().numpy().data)
    return digest.hexdigest()
