"""The contract of strategies that merge experts: write one pure function of a named tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor
from torch.optim.swa_utils import update_bn

from shiftproof.benchmark import ExpertExperience, Model, RunContext
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.merging.driver import merge_states, spectral_share

BATCH = 128  # inputs at a time, where running statistics are recomputed


@dataclass(frozen=True)
class MergeConfig:
    """What every merge can be told."""

    recalibrate_bn: bool = field(default=False, kw_only=True)  # recompute running statistics on the experts' data


C = TypeVar("C", bound=MergeConfig)


class MergeStrategy(ABC, Generic[C]):
    """Merges experts into one model.

    Write `merge`. Methods with statistics over all tensors set `rounds` and write `scan` and `combine`; methods that treat
    matrices apart write `path`. The same object merges models in a run and checkpoints on disk, where it has no context.
    Running statistics, counters and private heads never reach it: the harness averages or copies them.

    Args:
        context: Of the run; None where checkpoints are merged.

    Attributes:
        rounds: Passes over all tensors before the merge, as a rule.
        blockwise: `scan` and `merge` may be given runs of a flattened tensor, one after another: nothing depends on shape,
            position or the rest of the tensor.
        streams: `merge` goes over `experts` in order and is done with each before it takes the next, so that files are read
            one expert at a time, into the same memory.
    """

    rounds: int = 0
    blockwise: bool = False
    streams: bool = False

    def __init__(self, config: C, context: RunContext | None = None) -> None:
        self.config = config
        self.context = context
        self.base: Model | None = None
        self.experts: list[StateDict] = []  # of what is shared and of every head
        self.private: StateDict = {}  # heads that belong to one task, as their expert left them
        self.shared: frozenset[str] = frozenset()
        self.inputs: list[Tensor] = []  # training data of the experts, where running statistics are to be recomputed

    @abstractmethod
    def merge(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Tensor:
        """(...) the merged tensor, base included.

        Args:
            name: In the state dict; random methods key their generator by it.
            base: (...) float32 or float64, before fine-tuning.
            experts: D tensors of its shape and dtype, after it. Neither may be altered.
            facts: What `combine` made of the last pass; None without passes.
        """

    def path(self, name: str, shape: Sequence[int]) -> Literal["spectral", "elementwise", "average"]:
        """How a tensor is merged, for reports."""
        return "elementwise"

    def refusal(self, shapes: Mapping[str, Sequence[int]], experts: int) -> str:
        """Why so many checkpoints cannot be merged in tensors of these names, and what to do; empty if they can."""
        return ""

    def scan(self, name: str, base: Tensor, experts: Sequence[Tensor], facts: Any) -> Any:
        """What one tensor contributes to this pass; never called where `rounds` is 0."""
        return None

    def combine(self, partials: Mapping[str, Any], facts: Any) -> Any:
        """The facts out of one pass; never called where `rounds` is 0."""
        return None

    def is_ready(self, facts: Any) -> bool:
        """Whether these facts will do after the last round; more passes follow until they do."""
        return True

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Take in an expert."""
        self.base = experience.base
        self.shared = experience.shared
        state = experience.expert.state_dict()
        self.experts.append({name: tensor.detach().cpu() for name, tensor in state.items()})
        if self.config.recalibrate_bn:
            assert experience.data is not None  # the harness gives it to whoever says so
            self.inputs.append(experience.data.train.inputs(slice(None)))
        own = experience.private
        self.private.update({name: tensor for name, tensor in self.experts[-1].items() if name in own})
        shapes = {name: tuple(state[name].shape) for name in sorted(self.shared)}
        return {"spectral_share": spectral_share(self, shapes)} if self.is_spectral else {}

    @property
    def is_spectral(self) -> bool:
        """Whether the method treats some shapes by their singular vectors."""
        return self.path("weight", (8, 8)) == "spectral"

    def model(self) -> Model:
        """The base with the experts' merge in its shared tensors, and each task's own head; one expert is its own merge."""
        assert self.base is not None
        merged = deepcopy(self.base)
        base = {name: tensor.detach().cpu() for name, tensor in self.base.state_dict().items()}
        if len(self.experts) == 1:
            state = {name: self._alone(name, tensor) if name in self.shared else tensor for name, tensor in base.items()}
        else:
            state, _ = merge_states(self, base, self.experts, self.shared.__contains__)
        merged.load_state_dict({**state, **self.private})
        if self.config.recalibrate_bn:
            device = next(merged.parameters()).device
            # In turn from every expert, since statistics are means over batches.
            batches = [part for parts in zip(*(x.split(BATCH) for x in self.inputs), strict=False) for part in parts]
            update_bn(batches, merged.backbone, device)
        return merged

    def _alone(self, name: str, base: Tensor) -> Tensor:
        expert, scale = self.experts[0][name], getattr(self.config, "scale", 1.0)
        return base.lerp(expert, scale) if scale != 1 and base.is_floating_point() else expert
