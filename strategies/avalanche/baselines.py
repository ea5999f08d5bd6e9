"""Avalanche's own strategies under the stream's recipe. Knobs bear Avalanche's names.

Memories are of the size of `er`, 1024 samples or 128 for each of eight tasks, so that rows of a board compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from shiftproof.benchmark import DataExperience, StrategySpec, hookimpl
from shiftproof.strategies.avalanche.bridge import AvalancheParts, AvalancheStrategy, missing

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate


@dataclass(frozen=True)
class NaiveConfig:
    """No knobs."""


@dataclass(frozen=True)
class ReplayConfig:
    """Knobs of Avalanche's ReplayPlugin."""

    mem_size: Annotated[int, Ge(1)] = 1024  # samples, as in `er`; Avalanche: 200
    batch_size_mem: Annotated[int, Ge(0)] = 0  # samples a step; 0 = the recipe's batch size, as in Avalanche


@dataclass(frozen=True)
class EwcConfig:
    """Knobs of Avalanche's EWCPlugin, which has no default strength."""

    ewc_lambda: Annotated[float, Ge(0)] = 400.0  # of the penalty; paper: 400 on Atari, none printed for supervised tasks
    mode: Literal["separate", "online"] = "separate"  # a penalty for each experience, as in the paper, or one running penalty
    decay_factor: Annotated[float, Ge(0), Le(1)] = 0.9  # of the running importance, mode="online"


@dataclass(frozen=True)
class LwfConfig:
    """Defaults of the paper, which are Avalanche's."""

    alpha: Annotated[float, Ge(0)] = 1.0  # of the distillation; paper, Eq. 1: 1
    temperature: Annotated[float, Gt(0)] = 2.0  # of the softmax; paper, section 3: 2


@dataclass(frozen=True)
class AgemConfig:
    """Knobs of Avalanche's AGEMPlugin."""

    patterns_per_exp: Annotated[int, Ge(1)] = 128  # stored of each experience; Avalanche has no default
    sample_size: Annotated[int, Ge(1)] = 64  # for the reference gradient, at least one of each experience; Avalanche: 64


@dataclass(frozen=True)
class GemConfig:
    """Knobs of Avalanche's GEMPlugin."""

    patterns_per_exp: Annotated[int, Ge(1)] = 128  # stored of each experience; Avalanche has no default
    memory_strength: Annotated[float, Ge(0)] = 0.5  # margin of the constraints (gamma in the paper); Avalanche: 0.5


class AvalancheNaive(AvalancheStrategy[NaiveConfig]):
    """Avalanche's fine-tuning, the counterpart of `sgd`."""

    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """Naive."""
        from avalanche.training.supervised import Naive

        return Naive(**parts)


class AvalancheReplay(AvalancheStrategy[ReplayConfig]):
    """Avalanche's replay: a reservoir that is balanced over experiences and filled after each of them."""

    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """Naive with ReplayPlugin, since Replay does not hand on the size of the memory's batch."""
        from avalanche.training.plugins import ReplayPlugin
        from avalanche.training.supervised import Naive

        parts["plugins"].append(ReplayPlugin(self.config.mem_size, batch_size_mem=self.config.batch_size_mem or None))
        return Naive(**parts)


class AvalancheEwc(AvalancheStrategy[EwcConfig]):
    """Avalanche's elastic weight consolidation: a quadratic penalty on moving weights that mattered."""

    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """EWC."""
        from avalanche.training.supervised import EWC

        decay = self.config.decay_factor if self.config.mode == "online" else None
        return EWC(**parts, ewc_lambda=self.config.ewc_lambda, mode=self.config.mode, decay_factor=decay)


class AvalancheLwf(AvalancheStrategy[LwfConfig]):
    """Avalanche's learning without forgetting: the answers of the model before the experience are distilled."""

    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """LwF."""
        from avalanche.training.supervised import LwF

        return LwF(**parts, alpha=self.config.alpha, temperature=self.config.temperature)


class AvalancheAgem(AvalancheStrategy[AgemConfig]):
    """Avalanche's averaged GEM: no step against the mean gradient of the memory."""

    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """AGEM."""
        from avalanche.training.supervised import AGEM

        return AGEM(**parts, patterns_per_exp=self.config.patterns_per_exp, sample_size=self.config.sample_size)


class AvalancheGem(AvalancheStrategy[GemConfig]):
    """Avalanche's gradient episodic memory: no step against the gradient of any earlier experience."""

    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """GEM."""
        from avalanche.training.supervised import GEM

        return GEM(**parts, patterns_per_exp=self.config.patterns_per_exp, memory_strength=self.config.memory_strength)


_REPLAY = "Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019, arXiv:1902.10486"
_EWC = "Kirkpatrick et al., Overcoming Catastrophic Forgetting in Neural Networks, PNAS 2017, arXiv:1612.00796"
_AGEM = "Chaudhry et al., Efficient Lifelong Learning with A-GEM, ICLR 2019, arXiv:1812.00420"
_GEM = "Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NIPS 2017, arXiv:1706.08840"
_LWF = "Li and Hoiem, Learning without Forgetting, ECCV 2016, arXiv:1606.09282"
_NAIVE = "Carta et al., Avalanche: A PyTorch Library for Deep Continual Learning, JMLR 2023, arXiv:2302.01766"


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """`avalanche-naive`, `-replay`, `-ewc`, `-lwf`, `-agem` and `-gem`."""
    absent, absent_gem = missing("avalanche"), missing("avalanche", "quadprog")
    return [
        StrategySpec("avalanche-naive", AvalancheNaive, NaiveConfig, DataExperience, _NAIVE, unavailable=absent),
        StrategySpec("avalanche-replay", AvalancheReplay, ReplayConfig, DataExperience, _REPLAY, unavailable=absent),
        StrategySpec("avalanche-ewc", AvalancheEwc, EwcConfig, DataExperience, _EWC, unavailable=absent),
        StrategySpec("avalanche-lwf", AvalancheLwf, LwfConfig, DataExperience, _LWF, unavailable=absent),
        StrategySpec("avalanche-agem", AvalancheAgem, AgemConfig, DataExperience, _AGEM, unavailable=absent),
        StrategySpec("avalanche-gem", AvalancheGem, GemConfig, DataExperience, _GEM, unavailable=absent_gem),
    ]
