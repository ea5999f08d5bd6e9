"""The contract of strategies that carry a fine-tuning over to a new release of the backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Generic, TypeVar

from annotated_types import Ge
from torch import Tensor

from shiftproof.benchmark import Model, RunContext, TransportExperience
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.alignment import Alignment, added, task_vector
from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.method import Progress, silent
from shiftproof.benchmark.transporting.specification import PermutationSpec


@dataclass(frozen=True)
class TransportConfig:
    """What every transport can be told."""

    alpha: Annotated[float, Ge(0)] = field(default=1.0, kw_only=True)  # of the task vector; thesis eq. 8.8


C = TypeVar("C", bound=TransportConfig)


class TransportStrategy(ABC, Generic[C]):
    """Brings what fine-tuning has changed in one release to another.

    Write `transport`; where a task has a head of its own, `carry` says what becomes of it.

    Args:
        context: Of the run; None where checkpoints are transported.
    """

    def __init__(self, config: C, context: RunContext | None = None) -> None:
        self.config = config
        self.context = context
        self.net: Model | None = None

    @abstractmethod
    def transport(self, source_base: StateDict, task_vector: StateDict, target_base: StateDict) -> StateDict:
        """The tensors of the target's model after transport.

        Args:
            source_base: theta_A, of everything that both releases have.
            task_vector: theta_A_ft - theta_A, of its floating-point parameters.
            target_base: theta_B. None of the three may be altered.
        """

    def carry(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that belongs to the task alone, as it comes over from the fine-tuned source; asked for after `transport`."""
        return tensor

    def learn(self, experience: TransportExperience) -> Mapping[str, float]:
        """Transport one fine-tuning."""
        assert experience.target_base is not None  # the harness gives it to whoever consumes it
        self.prepare(experience)
        shared = experience.shared
        source, tuned, target = (_cpu(m) for m in (experience.base, experience.expert, experience.target_base))
        of_source, of_target = ({name: state[name] for name in sorted(shared)} for state in (source, target))
        moved = self.transport(of_source, task_vector(of_source, {name: tuned[name] for name in of_source}), of_target)
        private = {name: self.carry(name, tuned[name]) for name in sorted(experience.private)}
        self.net = deepcopy(experience.target_base)
        self.net.load_state_dict({**target, **moved, **private})
        return self.logs()

    def prepare(self, experience: TransportExperience) -> None:
        """Called first, for strategies that look at more than weights."""

    def logs(self) -> Mapping[str, float]:
        """Numbers worth logging, after the transport."""
        return {}

    def model(self) -> Model:
        """The target with what was transported."""
        assert self.net is not None
        return self.net


class RebasinStrategy(TransportStrategy[C]):
    """Transports along an alignment of both releases: theta_B + alpha * pi(tau). Write `align`."""

    specification: PermutationSpec

    def __init__(self, config: C, context: RunContext | None = None) -> None:
        super().__init__(config, context)
        self.alignment: Alignment | None = None

    @abstractmethod
    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """Permutations that bring `source` next to `target`.

        Args:
            specification: With one permutation for each segment of a residual stream; covers both models.
        """

    def prepare(self, experience: TransportExperience) -> None:
        """Find out what can be permuted."""
        self.specification = derive_model(experience.base)

    def transport(self, source_base: StateDict, task_vector: StateDict, target_base: StateDict) -> StateDict:
        """theta_B + alpha * pi(tau), thesis eq. 8.8."""
        own = self.specification.restricted(frozenset(source_base))
        self.alignment = self.align(source_base, target_base, own)
        return added(target_base, self.alignment.apply(task_vector), self.config.alpha)

    def carry(self, name: str, tensor: Tensor) -> Tensor:
        """The task's head, its input side permuted like what it reads."""
        assert self.alignment is not None
        return self.specification.apply_to(name, tensor, self.alignment.permutations)

    def logs(self) -> Mapping[str, float]:
        """What the search took."""
        assert self.alignment is not None
        search = self.alignment.search
        return {"sweeps": float(search.sweeps), "visits": float(search.visits)}


def _cpu(model: Model) -> StateDict:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
