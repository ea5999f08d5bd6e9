"""PCB: parameters compete, within a task by magnitude and between tasks by agreement; the winners' weighted mean is merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from shiftproof.strategies.merging.order_statistics import Search
from shiftproof.strategies.merging.strategy import MergeConfig, MergeStrategy
from shiftproof.strategies.merging.task_vectors import add_merged, differences, magnitudes

MOST = 80  # experts whose exp(D) float32 holds with room to spare


@dataclass(frozen=True)
class PcbConfig(MergeConfig):
    """The form that SCORE compares with (Table 1); the preset `standalone` holds that of the authors' single-file release."""

    form: Literal["parameter-competition", "standalone"] = "parameter-competition"  # which balance between tasks
    ratio: Annotated[float, Gt(0), Le(1)] = 0.05  # share of the entries of a task that keep a weight; standalone 0.1
    clip: Annotated[float, Ge(0), Lt(0.5)] = 0.01  # share of magnitudes clamped at either end; standalone 0.0001
    scale: Annotated[float, Ge(0)] = 1.0  # lambda; of the merged task vector


@dataclass(frozen=True)
class Competition:
    """Facts of the passes, by expert.

    Attributes:
        bounds: The search for the least and the greatest clamped magnitude.
        cuts: The search for the least and the greatest clamped score, once the bounds are found.
    """

    bounds: Search = field(default_factory=Search)
    cuts: Search = field(default_factory=Search)


class Pcb(MergeStrategy[PcbConfig]):
    """Parameter competition balancing (Du et al., NeurIPS 2024, arXiv:2410.02396, section 3).

    With x the task vectors, their magnitudes clamped between two order statistics of the task, and x^ = sign * minmax(|x|):
    score = exp(D * minmax(|x|)^2) * sum_j tanh(x^_i x^_j), or tanh(x_i sum_j x_j) of the unclamped x in the standalone form;
    weight = minmax(score, clamped from below at its (1 - ratio) quantile); merged = sum(weight * x) / sum(weight). Every order
    statistic is over all parameters of a task. Where all values of a task are equal, as in an expert that equals the base,
    minmax is 0, so that it takes no part.
    """

    rounds = 4
    blockwise = True

    def is_ready(self, facts: Competition) -> bool:
        """After four passes, or two more wherever a sample misled."""
        return facts.cuts.values is not None

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Competition | None) -> Any:
        """What the searches ask for, among the magnitudes and then among the scores."""
        facts = facts or Competition()
        bounds = facts.bounds.values
        if bounds is None:
            return facts.bounds.scan(base, experts, magnitudes)
        return facts.cuts.scan(base, experts, lambda base, experts: self.scores(base, experts, bounds))

    def combine(self, partials: Mapping[str, Any], facts: Competition | None) -> Competition:
        """How the searches go on."""
        facts = facts or Competition()
        if facts.bounds.values is None:
            return Competition(facts.bounds.combined(partials.values(), self.clip_ranks))
        return replace(facts, cuts=facts.cuts.combined(partials.values(), self.cut_ranks))

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Competition) -> Tensor:
        """(...) base + scale * weighted mean of the clamped task vectors."""
        bounds, cuts = facts.bounds.values, facts.cuts.values
        assert bounds is not None
        assert cuts is not None

        def rule(block: Tensor) -> Tensor:
            weight = _minmax(self.score(block, bounds), cuts)  # (D, B)
            total = weight.sum(0).clamp_(min=1e-12)
            clamped = _clamp(block.abs(), bounds).mul_(block.sign_())
            return weight.mul_(clamped).sum(0).div_(total)

        return add_merged(base, experts, rule, self.config.scale)

    def clip_ranks(self, entries: int) -> tuple[int, int]:
        """0-based ranks of the least and the greatest clamped magnitude."""
        return int(entries * self.config.clip), max(0, int(entries * (1 - self.config.clip) - 1))

    def cut_ranks(self, entries: int) -> tuple[int, int]:
        """0-based ranks of the least and the greatest clamped score."""
        return max(0, min(int(entries * (1 - self.config.ratio)), entries - 1)), max(0, entries - 1)

    def scores(self, base: Tensor, experts: Sequence[Tensor], bounds: list[list[float]]) -> Iterator[Tensor]:
        """Blocks of scores: (D, B)."""
        for block in differences(base, experts):
            yield self.score(block, bounds)

    def score(self, block: Tensor, bounds: list[list[float]]) -> Tensor:
        """(D, B) scores of (D, B) differences."""
        unit = _minmax(block.abs(), bounds)
        # Beyond float32's exp a common factor is taken out, which minmax does not notice.
        within = unit.square().mul_(len(block)).sub_(max(0, len(block) - MOST)).exp_()
        if self.config.form == "standalone":
            return within.mul_(torch.tanh(block * block.sum(0)))
        return within.mul_(_agreement(unit.mul_(block.sign())))


def _agreement(unit: Tensor) -> Tensor:
    """(D, B) sum over j of tanh(x_i x_j); each pair is computed once."""
    total = torch.zeros_like(unit)
    for i in range(len(unit)):
        for j in range(i, len(unit)):
            pair = torch.tanh(unit[i] * unit[j])
            total[i] += pair
            if j != i:
                total[j] += pair
    return total


def _clamp(values: Tensor, bounds: list[list[float]]) -> Tensor:
    """The (D, B) values themselves, clamped between the (low, high) of each row."""
    for row, (low, high) in zip(values, bounds, strict=True):
        row.clamp_(low, high)
    return values


def _minmax(values: Tensor, bounds: list[list[float]]) -> Tensor:
    """The (D, B) values themselves, clamped and moved to [0, 1]; 0 where the bounds of a row are equal."""
    for row, (low, high) in zip(_clamp(values, bounds), bounds, strict=True):
        if high > low:
            row.sub_(low).div_(high - low)
        else:
            row.zero_()
    return values
