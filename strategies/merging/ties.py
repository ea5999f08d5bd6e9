"""TIES: trim each task vector to its largest entries, elect a sign for each parameter, average what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from shiftproof.benchmark import RunContext
from shiftproof.strategies.merging.order_statistics import Search, order_statistics
from shiftproof.strategies.merging.strategy import MergeConfig, MergeStrategy
from shiftproof.strategies.merging.task_vectors import add_merged, differences, magnitudes


@dataclass(frozen=True)
class TiesConfig(MergeConfig):
    """Defaults from section 4 of the paper, at the scale of its hyper-parameter-free setting."""

    density: Annotated[float, Gt(0), Le(1)] = 0.2  # share of the entries of a task vector that survive
    granularity: Literal["global", "tensor"] = "global"  # over which entries the share and the majority sign are counted
    elect: Literal["mass", "count"] = "mass"  # sign of the sum of trimmed entries, or of the sum of their signs
    aggregate: Literal["mean", "sum"] = "mean"  # of the entries that agree with the elected sign
    scale: Annotated[float, Ge(0)] = 1.0  # lambda; of the merged task vector


@dataclass(frozen=True)
class Trimming:
    """Facts of the passes.

    Attributes:
        search: For the smallest magnitude that survives of each expert.
        votes: Sum of the elected signs over all entries, once the magnitudes are found.
    """

    search: Search = field(default_factory=Search)
    votes: int | None = None

    @property
    def thresholds(self) -> list[float] | None:
        """The smallest magnitude that survives of each expert."""
        return None if self.search.values is None else [value for (value,) in self.search.values]


class Ties(MergeStrategy[TiesConfig]):
    """Trim, elect sign and merge (Yadav et al., NeurIPS 2023, arXiv:2306.01708, Algorithm 1).

    Of d entries, those survive that are at least as large as the (d - floor(d * density))-th smallest magnitude: one more than
    the share says, and all that equal it. Where the trimmed entries cancel exactly, the sign of the sum of all elected signs
    stands in; where that is 0 as well, the negative side.
    """

    def __init__(self, config: TiesConfig, context: RunContext | None = None) -> None:
        super().__init__(config, context)
        self.blockwise = config.granularity == "global"
        self.rounds = 3 if self.blockwise else 0

    def is_ready(self, facts: Trimming) -> bool:
        """After three passes, or five where the sample misled."""
        return facts.votes is not None

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Trimming | None) -> Any:
        """What the search for the thresholds asks for; then the sum of elected signs."""
        facts = facts or Trimming()
        if facts.thresholds is None:
            return facts.search.scan(base, experts, magnitudes)
        return self.votes(base, experts, facts.thresholds)

    def combine(self, partials: Mapping[str, Any], facts: Trimming | None) -> Trimming:
        """How the search goes on; then the majority."""
        facts = facts or Trimming()
        if facts.thresholds is None:
            return Trimming(facts.search.combined(partials.values(), self.rank))
        return replace(facts, votes=sum(partials.values()))

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Trimming | None) -> Tensor:
        """(...) base + scale * mean of the trimmed entries that agree with the elected sign."""
        if facts is None:
            thresholds = [value for (value,) in order_statistics(base, experts, magnitudes, self.rank)]
            votes = self.votes(base, experts, thresholds)
        else:
            assert facts.thresholds is not None
            assert facts.votes is not None
            thresholds, votes = facts.thresholds, facts.votes
        return add_merged(base, experts, lambda block: self.agreed(trimmed(block, thresholds), votes), self.config.scale)

    def rank(self, entries: int) -> tuple[int]:
        """0-based rank of the smallest magnitude that survives."""
        return (max(0, entries - int(entries * self.config.density) - 1),)

    def votes(self, base: Tensor, experts: Sequence[Tensor], thresholds: Sequence[float]) -> int:
        """Sum of the elected signs of a tensor."""
        return sum(int(self.mass(trimmed(block, thresholds)).sign_().sum()) for block in differences(base, experts))

    def mass(self, block: Tensor) -> Tensor:
        """(B,) whose sign is elected, out of (D, B) trimmed entries."""
        return (block if self.config.elect == "mass" else block.sign()).sum(0)

    def agreed(self, block: Tensor, votes: int) -> Tensor:
        """(B,) merged out of (D, B) trimmed entries."""
        mass = self.mass(block)
        is_up = mass >= 0 if votes > 0 else mass > 0
        side = is_up.to(block.dtype).mul_(2).sub_(1)  # (B,) of 1 and -1
        agreeing = block.mul_(side).clamp_(min=0)  # magnitudes; torch.where over (D, B) takes five times as long
        total = agreeing.sum(0).mul_(side)
        return total if self.config.aggregate == "sum" else total.div_(agreeing.sign_().sum(0).clamp_(min=1))


def trimmed(block: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The (D, B) block itself, each row with zeros where the magnitude is below its threshold."""
    for row, threshold in zip(block, thresholds, strict=True):
        torch.hardshrink(row, _below(threshold, block.dtype), out=row)
    return block


@lru_cache(maxsize=1 << 12)
def _below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of the dtype below the threshold: hardshrink drops what equals its bound."""
    bound = torch.tensor(threshold, dtype=dtype)
    if bound.item() >= threshold:
        bound = torch.nextafter(bound, torch.tensor(-torch.inf, dtype=dtype))
    return bound.item()
