"""Base classes and shared parts for authors of strategies, and the baselines."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if __name__ != "shiftproof.strategies":
    raise ImportError("import this package as 'shiftproof.strategies'")

if TYPE_CHECKING:
    from shiftproof.strategies.augmentation import augment as augment
    from shiftproof.strategies.cluster_heads import ClusterHeads as ClusterHeads
    from shiftproof.strategies.cluster_weights import ClusterWeights as ClusterWeights
    from shiftproof.strategies.clustering import (
        cluster_per_class as cluster_per_class,
        kmeans as kmeans,
        overcluster_per_class as overcluster_per_class,
    )
    from shiftproof.strategies.features import extract_features as extract_features
    from shiftproof.strategies.fused_heads import fuses_heads as fuses_heads
    from shiftproof.strategies.group_weights import (
        GroupWeights as GroupWeights,
        RelativeDifficulty as RelativeDifficulty,
        amplified_cross_entropy as amplified_cross_entropy,
    )
    from shiftproof.strategies.heads import Heads as Heads
    from shiftproof.strategies.replay import (
        GroupBalancedBuffer as GroupBalancedBuffer,
        LossBinnedBuffer as LossBinnedBuffer,
        Memory as Memory,
        ReservoirBuffer as ReservoirBuffer,
    )
    from shiftproof.strategies.training import TrainingStrategy as TrainingStrategy, joined as joined

# Resolved on first use (PEP 562), so that naming one does not import the others.
_HOME = {
    "augment": "augmentation",
    "ClusterHeads": "cluster_heads",
    "ClusterWeights": "cluster_weights",
    "cluster_per_class": "clustering",
    "kmeans": "clustering",
    "overcluster_per_class": "clustering",
    "extract_features": "features",
    "fuses_heads": "fused_heads",
    "GroupWeights": "group_weights",
    "RelativeDifficulty": "group_weights",
    "amplified_cross_entropy": "group_weights",
    "Heads": "heads",
    "GroupBalancedBuffer": "replay",
    "LossBinnedBuffer": "replay",
    "Memory": "replay",
    "ReservoirBuffer": "replay",
    "TrainingStrategy": "training",
    "joined": "training",
}

__all__ = [
    "ClusterHeads",
    "ClusterWeights",
    "GroupBalancedBuffer",
    "GroupWeights",
    "Heads",
    "LossBinnedBuffer",
    "Memory",
    "RelativeDifficulty",
    "ReservoirBuffer",
    "TrainingStrategy",
    "amplified_cross_entropy",
    "augment",
    "cluster_per_class",
    "extract_features",
    "fuses_heads",
    "joined",
    "kmeans",
    "overcluster_per_class",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
