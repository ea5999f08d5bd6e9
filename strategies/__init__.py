"""Base classes and shared parts for authors of strategies, and the baselines."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if __name__ != "shiftproof.strategies":
    raise ImportError("import this package as 'shiftproof.strategies'")

if TYPE_CHECKING:
    from shiftproof.strategies.cluster_weights import ClusterWeights as ClusterWeights
    from shiftproof.strategies.clustering import cluster_per_class as cluster_per_class, kmeans as kmeans
    from shiftproof.strategies.features import extract_features as extract_features
    from shiftproof.strategies.heads import Heads as Heads
    from shiftproof.strategies.replay import GroupBalancedBuffer as GroupBalancedBuffer, LossBinnedBuffer as LossBinnedBuffer, ReservoirBuffer as ReservoirBuffer
    from shiftproof.strategies.training import TrainingStrategy as TrainingStrategy

# Resolved on first use (PEP 562), so that naming one does not import the others.
_HOME = {
    "ClusterWeights": "cluster_weights",
    "cluster_per_class": "clustering",
    "kmeans": "clustering",
    "extract_features": "features",
    "Heads": "heads",
    "GroupBalancedBuffer": "replay",
    "LossBinnedBuffer": "replay",
    "ReservoirBuffer": "replay",
    "TrainingStrategy": "training",
}

__all__ = [
    "ClusterWeights",
    "GroupBalancedBuffer",
    "Heads",
    "LossBinnedBuffer",
    "ReservoirBuffer",
    "TrainingStrategy",
    "cluster_per_class",
    "extract_features",
    "kmeans",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
