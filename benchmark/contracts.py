"""What a plugin implements and what it says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

    from shiftproof.benchmark.context import RunContext
    from shiftproof.benchmark.metrics import CellScores
    from shiftproof.benchmark.running.executors import Executor
    from shiftproof.benchmark.streams import Stream, Tier

E_contra = TypeVar("E_contra", contravariant=True)
C = TypeVar("C")

State = dict[str, Any]
"""Nested dicts and lists of tensors, numbers, strings, booleans and None: what `torch.load(weights_only=True)` reads back."""


class Strategy(Protocol[E_contra]):
    """The whole contract. The type of experience that a strategy consumes decides its family."""

    def learn(self, experience: E_contra) -> Mapping[str, float]:
        """Learn one experience; return numbers worth logging."""
        ...

    def model(self) -> nn.Module:
        """The model as it stands: `forward(x, task) -> logits`, one logit per class of the task."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """Optional: a strategy that can go on in the middle of an experience."""

    def state(self) -> State:
        """Everything that `load` needs to go on bit for bit."""
        ...

    def load(self, state: State) -> None:
        """Take up where `state` was taken."""
        ...


@dataclass(frozen=True)
class StrategySpec(Generic[C]):
    """Facts about a strategy, as data.

    Attributes:
        name: Unique, lower case, words joined by '-'.
        build: `build(config, context) -> Strategy`; a class with that constructor will do.
        config: A frozen dataclass with a default for every field.
        consumes: The experience type: `DataExperience`, `JointExperience`, `ExpertExperience` or `TransportExperience`.
        reference: Citation of the paper.
        presets: Named configs; chosen with `name@preset`.
        uses_group_labels: It is handed `GroupedExperience` and ranked apart.
        uses_bias_knowledge: It alters what the bias lives in (colour, say); ranked apart like group labels.
        needs_data: A merge or transport that looks at data.
        unavailable: Why it cannot run here (a missing extra); empty if it can.
        uses_target: Where a domain is held out it learns that domain's own training set: an upper bound, never ranked.
        data_knob: Name of a boolean field of the config that makes it look at data; "" = none.
    """

    name: str
    build: Callable[[C, RunContext], Strategy[Any]]
    config: type[C]
    consumes: type
    reference: str
    presets: Mapping[str, C] = field(default_factory=dict)
    uses_group_labels: bool = False
    uses_bias_knowledge: bool = False
    needs_data: bool = False
    unavailable: str = ""
    uses_target: bool = False
    data_knob: str = ""


@dataclass(frozen=True)
class StreamSpec(Generic[C]):
    """Facts about a stream; `build(config, root)` makes it, where `root` is the folder the user named for data, or None."""

    name: str
    build: Callable[[C, str | None], Stream]
    config: type[C]
    tier: Tier
    description: str
    reference: str
    licence: str
    files: tuple[str, ...] = ()  # what a `full` stream needs below the data folder


@dataclass(frozen=True)
class SuiteSpec:
    """A matrix of streams, strategies (with '@preset'), seeds and overrides."""

    name: str
    description: str
    streams: tuple[str, ...]
    strategies: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()  # "recipe.epochs=4"
    recipe: str = ""  # names the recipe in records and boards where `overrides` change it


@dataclass(frozen=True)
class MetricSpec:
    """A pure function of the scores of one cell.

    Attributes:
        compute: `compute(scores) -> value`, None where the metric means nothing.
        over_folds: How folds become one number; "worst" is the minimum on leave-one-domain-out and the mean elsewhere.
        primary: Shown as a column of every board.
    """

    name: str
    compute: Callable[[CellScores], float | None]
    higher_is_better: bool
    definition: str
    over_folds: Literal["mean", "worst"] = "mean"
    primary: bool = False


@dataclass(frozen=True)
class BackboneSpec:
    """`build(input_shape) -> module` that maps (B, *input_shape) float32 to (B, features) and has the attribute `features`."""

    name: str
    build: Callable[[tuple[int, ...]], nn.Module]
    description: str
    reference: str


@dataclass(frozen=True)
class ExecutorSpec:
    """`build() -> Executor`, which runs the cells of a matrix.

    Attributes:
        unavailable: Why it cannot run here (a missing extra); empty if it can.
        elsewhere: Cells run on other machines, so that `--device cuda` needs no GPU on this one.
    """

    name: str
    build: Callable[[], Executor]
    description: str
    unavailable: str = ""
    elsewhere: bool = False


EXPERT_TRAINER = "sgd"  # the strategy that fine-tunes the base where a stream of data becomes one of experts

Strategies = Sequence[StrategySpec[Any]]
