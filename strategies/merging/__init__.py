"""Merging experts: the contract, and the parts that spectral methods share."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if __name__ != "shiftproof.strategies.merging":
    raise ImportError("import this package as 'shiftproof.strategies.merging'")

if TYPE_CHECKING:
    from shiftproof.strategies.merging.spectral import SpectralConfig as SpectralConfig, SpectralMerge as SpectralMerge
    from shiftproof.strategies.merging.strategy import MergeConfig as MergeConfig, MergeStrategy as MergeStrategy
    from shiftproof.strategies.subspaces import (
        SharedBasis as SharedBasis,
        changed as changed,
        leave_one_out as leave_one_out,
        shared_basis as shared_basis,
    )

# Resolved on first use (PEP 562), so that naming one does not import the others.
_HOME = {
    "MergeConfig": "merging.strategy",
    "MergeStrategy": "merging.strategy",
    "SharedBasis": "subspaces",
    "SpectralConfig": "merging.spectral",
    "SpectralMerge": "merging.spectral",
    "changed": "subspaces",
    "leave_one_out": "subspaces",
    "shared_basis": "subspaces",
}

__all__ = [
    "MergeConfig",
    "MergeStrategy",
    "SharedBasis",
    "SpectralConfig",
    "SpectralMerge",
    "changed",
    "leave_one_out",
    "shared_basis",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"shiftproof.strategies.{_HOME[name]}"), name)
