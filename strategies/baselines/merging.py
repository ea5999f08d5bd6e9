"""Merges that go element by element: task arithmetic, weight average, MagMax and DARE; TIES and PCB are registered here too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor

from shiftproof.benchmark import ExpertExperience, StrategySpec, hookimpl
from shiftproof.benchmark.context import derive_seed
from shiftproof.benchmark.merging.driver import mean
from shiftproof.strategies.merging.pcb import Pcb, PcbConfig
from shiftproof.strategies.merging.strategy import MergeConfig, MergeStrategy
from shiftproof.strategies.merging.task_vectors import add_merged
from shiftproof.strategies.merging.ties import Ties, TiesConfig


@dataclass(frozen=True)
class ScaleConfig(MergeConfig):
    """The scale at which SCORE compares (Table 1): nothing is tuned on the target."""

    scale: Annotated[float, Ge(0)] = 1.0  # lambda; of the merged task vector


@dataclass(frozen=True)
class WeightAverageConfig(MergeConfig):
    """Nothing to set."""


@dataclass(frozen=True)
class DareConfig(ScaleConfig):
    """The rate that section 4.2 of the paper finds harmless on language models."""

    drop: Annotated[float, Ge(0), Lt(1)] = 0.9  # probability that an entry of a task vector is dropped
    seed: Annotated[int, Ge(0)] = 0  # of the masks


class TaskArithmetic(MergeStrategy[ScaleConfig]):
    """base + scale * sum of the task vectors (Ilharco et al., ICLR 2023, arXiv:2212.04089, section 2)."""

    blockwise = True

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: None) -> Tensor:
        """(...) base + scale * sum."""
        return add_merged(base, experts, lambda block: block.sum(0), self.config.scale)


class WeightAverage(MergeStrategy[WeightAverageConfig]):
    """Mean of the experts: the uniform soup (Wortsman et al., ICML 2022, arXiv:2203.05482, Table 2)."""

    blockwise = True

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: None) -> Tensor:
        """(...) mean; the base has no say."""
        return mean(experts)

    def path(self, name: str, shape: Sequence[int]) -> Literal["average"]:
        """The plain mean."""
        return "average"


class MagMax(MergeStrategy[ScaleConfig]):
    """base + scale * the task vectors' entry of greatest magnitude (Marczak et al., ECCV 2024, arXiv:2407.06322, eq. 3).

    Of entries of one magnitude the later task's is taken, as in the authors' code.
    """

    blockwise = True

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: None) -> Tensor:
        """(...) base + scale * entry of greatest magnitude."""
        return add_merged(base, experts, greatest_magnitude, self.config.scale)


class Dare(MergeStrategy[DareConfig]):
    """Drop and rescale, then task arithmetic (Yu et al., ICML 2024, arXiv:2311.03099, section 3.2).

    Each entry of a task vector is dropped with probability p and divided by 1 - p otherwise, which leaves its expectation as it
    was. The mask depends on the seed, the tensor's name and the expert's position alone.
    """

    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: None) -> Tensor:
        """(...) base + scale * sum of what is left."""
        seeds = [derive_seed(self.config.seed, "dare", name, position) for position in range(len(experts))]
        bits = [np.random.SFC64(seed) for seed in seeds]

        def rule(block: Tensor) -> Tensor:
            for row, source in zip(block, bits, strict=True):
                row.mul_(kept(source, len(row), self.config.drop).to(row))
            return block.sum(0)

        return add_merged(base, experts, rule, self.config.scale / (1 - self.config.drop))


def greatest_magnitude(block: Tensor) -> Tensor:
    """(B,) the entry of greatest magnitude of each column of (D, B), the last of equals."""
    best = block[0]
    for row in block[1:]:
        best = torch.where(row.abs() >= best.abs(), row, best)
    return best


def kept(source: np.random.SFC64, entries: int, drop: float) -> Tensor:
    """(entries,) bool, False with probability `drop`; takes the next 32 bits an entry, of an even number of entries."""
    words = np.asarray(source.random_raw((entries + 1) // 2), dtype="<u8").view("<u4")[:entries]
    return torch.from_numpy(words >= np.uint64(round(drop * 2**32)))


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`task-arithmetic`, `weight-average`, `magmax`, `dare`, `ties` and `pcb`."""
    return [
        StrategySpec(
            "task-arithmetic",
            TaskArithmetic,
            ScaleConfig,
            ExpertExperience,
            reference="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089",
            data_knob="recalibrate_bn",
            presets={"released": ScaleConfig()},
        ),
        StrategySpec(
            "weight-average",
            WeightAverage,
            WeightAverageConfig,
            ExpertExperience,
            reference="Wortsman et al., Model Soups, ICML 2022, arXiv:2203.05482",
            data_knob="recalibrate_bn",
        ),
        StrategySpec(
            "magmax",
            MagMax,
            ScaleConfig,
            ExpertExperience,
            reference="Marczak et al., MagMax: Model Merging for Seamless Continual Learning, ECCV 2024, arXiv:2407.06322",
            data_knob="recalibrate_bn",
            presets={"released": ScaleConfig()},
        ),
        StrategySpec(
            "dare",
            Dare,
            DareConfig,
            ExpertExperience,
            reference="Yu et al., Language Models are Super Mario, ICML 2024, arXiv:2311.03099",
            data_knob="recalibrate_bn",
        ),
        StrategySpec(
            "ties",
            Ties,
            TiesConfig,
            ExpertExperience,
            reference="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv:2306.01708",
            data_knob="recalibrate_bn",
            presets={"released": TiesConfig(), "thesis": TiesConfig(density=0.1, granularity="tensor")},
        ),
        StrategySpec(
            "pcb",
            Pcb,
            PcbConfig,
            ExpertExperience,
            reference="Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024, arXiv:2410.02396",
            data_knob="recalibrate_bn",
            presets={"released": PcbConfig(), "standalone": PcbConfig(form="standalone", ratio=0.1, clip=0.0001)},
        ),
    ]
