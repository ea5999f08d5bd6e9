"""What TransFusion is measured against: tau as it is, Git Re-Basin, optimal transport, and models without any transport."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import RunContext, StrategySpec, TransportExperience, hookimpl
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.alignment import Alignment
from shiftproof.benchmark.transporting.method import Progress, silent
from shiftproof.benchmark.transporting.specification import PermutationSpec
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from shiftproof.strategies.transport.assignment import assign, moved, units
from shiftproof.strategies.transport.matching import MatchConfig, Matching
from shiftproof.strategies.transport.strategy import RebasinStrategy, TransportConfig


class Vanilla(RebasinStrategy[TransportConfig]):
    """theta_B + alpha * tau: no unit is moved."""

    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """Every unit where it is."""
        return Alignment(specification, specification.identity())


@dataclass(frozen=True)
class GitRebasinConfig(TransportConfig):
    """Defaults as in the port to PyTorch that the thesis compares with."""

    biases: bool = True  # they count; eq. 7.5-7.6 show weights alone
    order_seed: Annotated[int, Ge(0)] = 0  # each sweep visits the permutations in an order of its own
    max_sweeps: Annotated[int, Ge(1)] = 100


class GitRebasin(RebasinStrategy[GitRebasinConfig]):
    """Weight matching with one permutation for each residual stream, and attention as one projection.

    Units may change heads, so that a Transformer's function is not preserved (the thesis's "head contamination").
    """

    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """Coordinate ascent in random order, eq. 7.6."""
        plain = specification.shared().without_heads()
        config = self.config
        options = MatchConfig(biases=config.biases, order="random", order_seed=config.order_seed, max_sweeps=config.max_sweeps)
        found = Matching(source, target, plain, options, progress).run()
        return Alignment(specification, specification.spread(found.permutations), found.search)


class OptimalTransport(RebasinStrategy[TransportConfig]):
    """Hard transport on weights: layer by layer from the input, units next to each other in their normalized incoming weights.

    Uniform marginals of one size make the plan a permutation, so that an assignment problem gives it. Residual streams carry
    one plan, found from all layers that write to them; attention is one projection. Biases and norms do not count.
    """

    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """One pass in the order of depth."""
        plain = specification.shared().without_heads()
        found = plain.identity()
        for name in plain.sizes:
            matrices = [slot for slot in plain.slots[name] if len(plain.axes[slot.tensor]) > 1]
            incoming = [slot for slot in matrices if slot.axis == 0] or matrices
            if not incoming:
                continue
            total = torch.zeros(plain.sizes[name], plain.sizes[name])
            for slot in incoming:
                ours = units(target[slot.tensor], slot)
                theirs = units(moved(source[slot.tensor], slot, plain, found), slot)
                # Between vectors of length 1 the squared distance is 2 - 2 <a, b>.
                total += (F.normalize(ours, dim=1) @ F.normalize(theirs, dim=1).T).float()
            found[name] = assign(total)
            progress(0, name)
        return Alignment(specification, specification.spread(found))


@dataclass(frozen=True)
class ReferenceConfig:
    """No knobs."""


class TargetBase:
    """The new release as it is, with the head that was fine-tuned on the old one."""

    def __init__(self, config: ReferenceConfig, context: RunContext) -> None:
        self.net: nn.Module = nn.Identity()

    def learn(self, experience: TransportExperience) -> Mapping[str, float]:
        """Take the head over."""
        assert experience.target_base is not None
        self.net = deepcopy(experience.target_base)
        self.net.load_state_dict(_own(experience), strict=False)
        return {}

    def model(self) -> nn.Module:
        """The new release."""
        return self.net


class SourceExpert:
    """The fine-tuned old release: what one has before the new one comes out."""

    def __init__(self, config: ReferenceConfig, context: RunContext) -> None:
        self.net: nn.Module = nn.Identity()

    def learn(self, experience: TransportExperience) -> Mapping[str, float]:
        """Keep it."""
        self.net = experience.expert
        return {}

    def model(self) -> nn.Module:
        """The fine-tuned old release."""
        return self.net


class Retrained(FineTuning):
    """The new release fine-tuned on the task's data with the stream's recipe: what transport would save."""

    def learn(self, experience: Any) -> Mapping[str, float]:
        """Fine-tune the new release."""
        if isinstance(experience, TransportExperience):
            assert experience.target_base is not None
            assert experience.data is not None
            if not self._learning:  # else it goes on from a checkpoint
                self.net.load_state_dict(experience.target_base.state_dict())
            experience = experience.data
        return super().learn(experience)


def _own(experience: TransportExperience) -> dict[str, Tensor]:
    state = experience.expert.state_dict()
    return {name: state[name] for name in experience.private}


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`vanilla`, `git-rebasin` and `ot`; `target-base`, `source-expert` and `retrained` bound them."""
    transport = "Rinaldi, Capitani et al., Update Your Transformer to the Latest Release, ICML 2025; thesis Table 8.1"
    return [
        StrategySpec(
            "vanilla",
            Vanilla,
            TransportConfig,
            TransportExperience,
            reference="Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089",
        ),
        StrategySpec(
            "git-rebasin",
            GitRebasin,
            GitRebasinConfig,
            TransportExperience,
            reference="Ainsworth et al., Git Re-Basin: Merging Models modulo Permutation Symmetries, ICLR 2023, "
            "arXiv:2209.04836",
        ),
        StrategySpec(
            "ot",
            OptimalTransport,
            TransportConfig,
            TransportExperience,
            reference="Imfeld et al., Transformer Fusion with Optimal Transport, ICLR 2024, arXiv:2310.05719",
        ),
        StrategySpec("target-base", TargetBase, ReferenceConfig, TransportExperience, reference=transport),
        StrategySpec("source-expert", SourceExpert, ReferenceConfig, TransportExperience, reference=transport),
        StrategySpec(
            "retrained",
            Retrained,
            FineTuningConfig,
            TransportExperience,
            reference=transport,
            needs_data=True,
            uses_target=True,
        ),
    ]
