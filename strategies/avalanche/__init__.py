"""Avalanche, both ways: its strategies here, our streams and our loss-binned buffer there.

Every use of Avalanche is in this package. Importing it takes seconds, so it is imported by whoever builds something with it and
not by this package: listing strategies, planning a run and every other strategy cost nothing.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from shiftproof.strategies.avalanche.baselines import shiftproof_strategies as shiftproof_strategies
from shiftproof.strategies.avalanche.bridge import (
    AvalancheParts as AvalancheParts,
    AvalancheStrategy as AvalancheStrategy,
    missing as missing,
)
from shiftproof.strategies.avalanche.data import to_avalanche as to_avalanche

if __name__ != "shiftproof.strategies.avalanche":
    raise ImportError("import this package as 'shiftproof.strategies.avalanche'")

if TYPE_CHECKING:
    from shiftproof.strategies.avalanche.storage import LossBinnedStorage as LossBinnedStorage

__all__ = ["AvalancheParts", "AvalancheStrategy", "LossBinnedStorage", "missing", "to_avalanche"]


def __getattr__(name: str) -> Any:
    if name != "LossBinnedStorage":  # the one class that cannot be defined without its base, which is Avalanche's
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _import_module(f"{__name__}.storage").LossBinnedStorage
