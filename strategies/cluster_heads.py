"""Classifiers of pseudo-labels: for each target label of each experience, a softmax over the clusters of that label."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftproof.strategies.clustering import ClassClusters
from shiftproof.strategies.heads import Heads


class ClusterHeads(Heads):
    """The classifiers C_y of ClusterFix (thesis 4.2.2) and LwS (thesis 5.3.1).

    One linear layer an experience holds the classifiers of all its labels side by side. An *address* says which columns
    answer for a sample: the first one among the columns of all experiences, and how many.
    """

    def start(self, name: str, features: int, clusters: ClassClusters, y: Tensor) -> Tensor:
        """New classifiers for an experience.

        Args:
            name: Of the experience; new.
            features: Width of the backbone's features.
            clusters: Found within each class.
            y: (N,) int64, targets.

        Returns:
            (N, 2) int64, the address of each training sample.
        """
        before = sum(classes for classes, _ in self.sizes().values())
        counts = torch.tensor(clusters.counts)
        self.add(name, features, int(counts.sum()))
        first = before + counts.cumsum(0) - counts  # of each label
        return torch.stack([first[y], counts[y]], dim=1)

    def own(self, features: Tensor, address: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Each sample's logits over the clusters of its own label.

        Args:
            features: (B, D) float32.
            address: (B, 2) int64 of `start`, of any experiences.
            width: Clusters of the label that has most, at most.

        Returns:
            (B, width) logits, the lowest finite value where a label has fewer clusters, and (B, width) bool, where it has not.
        """
        logits = self.every(features)  # (B, clusters of all labels of all experiences)
        columns = torch.arange(width, device=features.device)
        answered = columns < address[:, 1:]
        own = logits.gather(1, (address[:, :1] + columns).clamp(max=logits.shape[1] - 1))
        return own.masked_fill(~answered, torch.finfo(own.dtype).min), answered
