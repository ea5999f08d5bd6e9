"""Carrying a fine-tuning to a new release of its backbone: the contract, and the search for permutations."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if __name__ != "shiftproof.strategies.transport":
    raise ImportError("import this package as 'shiftproof.strategies.transport'")

if TYPE_CHECKING:
    from shiftproof.benchmark.experiences import StateDict as StateDict
    from shiftproof.benchmark.transporting.alignment import Alignment as Alignment, added as added
    from shiftproof.benchmark.transporting.method import Progress as Progress, silent as silent
    from shiftproof.benchmark.transporting.specification import PermutationSpec as PermutationSpec
    from shiftproof.strategies.transport.assignment import assign as assign
    from shiftproof.strategies.transport.matching import MatchConfig as MatchConfig, Matching as Matching
    from shiftproof.strategies.transport.strategy import (
        RebasinStrategy as RebasinStrategy,
        TransportConfig as TransportConfig,
        TransportStrategy as TransportStrategy,
    )

# Resolved on first use (PEP 562), so that naming one does not import the others.
_HOME = {
    "Alignment": "benchmark.transporting.alignment",
    "MatchConfig": "strategies.transport.matching",
    "Matching": "strategies.transport.matching",
    "PermutationSpec": "benchmark.transporting.specification",
    "Progress": "benchmark.transporting.method",
    "RebasinStrategy": "strategies.transport.strategy",
    "StateDict": "benchmark.experiences",
    "TransportConfig": "strategies.transport.strategy",
    "TransportStrategy": "strategies.transport.strategy",
    "added": "benchmark.transporting.alignment",
    "assign": "strategies.transport.assignment",
    "silent": "benchmark.transporting.method",
}

__all__ = [
    "Alignment",
    "MatchConfig",
    "Matching",
    "PermutationSpec",
    "Progress",
    "RebasinStrategy",
    "StateDict",
    "TransportConfig",
    "TransportStrategy",
    "added",
    "assign",
    "silent",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"shiftproof.{_HOME[name]}"), name)
