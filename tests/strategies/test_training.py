"""Strategies that train: the loop is a bare PyTorch loop, and a checkpoint loses nothing of it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import Batch, DataExperience, Model, Recipe, RunContext, Stream, as_float
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import Checkpointer, Cost
from shiftproof.benchmark.contracts import Resumable, State
from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.strategies import Heads, ReservoirBuffer, TrainingStrategy, augment

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, schedule="cosine")


@dataclass(frozen=True)
class NoKnobs:
    pass


class Plain(TrainingStrategy[NoKnobs]):
    def loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(batch), batch.y)


def base() -> tuple[Model, dict[str, Tensor]]:
    model = Model(SmallConvNet((3, 8, 8), (4, 8, 8)), {0: 2, 1: 2})
    return model, SmallConvNet((3, 8, 8), (4, 8, 8)).state_dict()


def context(recipe: Recipe = RECIPE, write: Callable[[State | None], None] | None = None) -> RunContext:
    checkpointer = None if write is None else Checkpointer(write, seconds=0)
    return RunContext(0, recipe, base, "base", Cache(Path("unused")), Path(), checkpointer=checkpointer)


@pytest.fixture
def stream(registry: Registry) -> Stream:
    spec = registry.stream("tiny")
    return spec.build(spec.config(), None)


@pytest.fixture
def data(stream: Stream) -> DataExperience:
    experience = stream.folds[0].train[0]
    assert isinstance(experience, DataExperience)
    return experience


def test_the_loss_goes_down_on_planted_data(data: DataExperience) -> None:
    def loss(epochs: int) -> float:
        return Plain(NoKnobs(), context(replace(RECIPE, epochs=epochs, schedule="constant"))).learn(data)["loss"]

    assert loss(1) > loss(10) > loss(30)
    assert loss(30) < 0.2 < math.log(2) - 0.1 < loss(1)


OPTIMIZERS: dict[str, Callable[[Any, Recipe], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, recipe: torch.optim.SGD(
        parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    ),
    "adam": lambda parameters, recipe: torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay),
    "adamw": lambda parameters, recipe: torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay),
}


def bare_loop(run: RunContext, data: DataExperience) -> tuple[Model, float]:
    """PyTorch as its tutorial has it, on the same batches."""
    recipe, net = run.recipe, run.new_model()
    optimizer = OPTIMIZERS[recipe.optimizer](net.parameters(), recipe)
    total = recipe.epochs * math.ceil(len(data.train) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: (1 + math.cos(math.pi * done / total)) / 2 if recipe.schedule == "cosine" else 1.0
    )
    for epoch in range(recipe.epochs):
        losses = []
        order = torch.randperm(len(data.train), generator=run.generator("order", data.index, epoch))
        for step, index in enumerate(order.split(recipe.batch_size)):
            x = augment(as_float(data.train.x[index]), recipe.augment, run.generator("augment", data.index, epoch, step))
            loss = F.cross_entropy(net(x, data.task), data.train.y[index])
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return net, float(sum(losses) / len(losses))


RECIPES = [
    RECIPE,
    replace(RECIPE, schedule="constant", batch_size=7, momentum=0.0, weight_decay=0.01),
    replace(RECIPE, optimizer="adam", lr=0.01, augment="shift"),
    replace(RECIPE, optimizer="adamw", lr=0.01, weight_decay=0.1, augment="crop-flip"),
    replace(RECIPE, clip_norm=0.1),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "constant", "adam", "adamw", "clipped"])
def test_training_equals_a_bare_pytorch_loop_on_the_same_batches_bit_for_bit(recipe: Recipe, data: DataExperience) -> None:
    strategy = Plain(NoKnobs(), context(recipe))
    logs = strategy.learn(data)
    net, loss = bare_loop(context(recipe), data)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(strategy.net.state_dict().values(), net.state_dict().values(), strict=True)
    )
    assert logs["loss"] == pytest.approx(loss, rel=1e-6)


def test_bfloat16_is_autocast_and_leaves_weights_in_float32(data: DataExperience) -> None:
    class Typed(Plain):
        def loss(self, batch: Batch) -> Tensor:
            logits = self.logits(batch)
            self.seen = str(logits.dtype)
            return F.cross_entropy(logits, batch.y)

    strategy = Typed(NoKnobs(), context(replace(RECIPE, precision="bfloat16")))
    strategy.learn(data)
    assert strategy.seen == "torch.bfloat16"
    assert {tensor.dtype for tensor in strategy.net.state_dict().values()} == {torch.float32}


class Moments(Plain):
    """Writes down when it was called, and with what."""

    def __init__(self, config: NoKnobs, run: RunContext) -> None:
        super().__init__(config, run)
        self.calls: list[str] = []

    def before_experience(self, experience: DataExperience) -> None:
        self.calls.append(f"before {experience.name}")

    def before_epoch(self, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def after_step(self, batch: Batch) -> None:
        self.calls.append(f"step {self.epoch}.{self.step} of {len(batch)}")

    def after_experience(self, experience: DataExperience) -> None:
        self.calls.append(f"after {experience.name}")


def test_the_moments_come_in_order_and_every_sample_once_an_epoch(data: DataExperience) -> None:
    strategy = Moments(NoKnobs(), context(replace(RECIPE, epochs=2, batch_size=20)))
    strategy.learn(data)
    steps = [[f"step {epoch}.{step} of {size}" for step, size in enumerate((20, 20, 8))] for epoch in range(2)]
    assert strategy.calls == ["before task-0", "epoch 0", *steps[0], "epoch 1", *steps[1], "after task-0"]
    assert strategy.context.cost == Cost(samples_seen=96, optimizer_steps=6)


def test_learning_leaves_the_global_generators_alone_and_does_not_depend_on_them(data: DataExperience) -> None:
    class Noisy(Plain):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) + F.dropout(self.features(batch.x)).mean()

    before = torch.get_rng_state()
    first = Noisy(NoKnobs(), context()).learn(data)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert Noisy(NoKnobs(), context()).learn(data) == first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_experience(data: DataExperience, value: float) -> None:
    class Diverging(Plain):
        def loss(self, batch: Batch) -> Tensor:
            return super().loss(batch) * (value if (self.epoch, self.step) == (1, 2) else 1.0)

    with pytest.raises(NotFiniteError, match=f"expected a finite loss, got {value} in epoch 1"):
        Diverging(NoKnobs(), context()).learn(data)


# Checkpoints -----------------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for SIGKILL."""


Make = Callable[[RunContext], Resumable]


def written(state: State | None) -> State:
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: State = torch.load(buffer, weights_only=True)
    return loaded


def finish(strategy: Any, experiences: Sequence[Any], learned: int) -> tuple[list[Mapping[str, float]], dict[str, Tensor]]:
    logs = [strategy.learn(experience) for experience in experiences[learned:]]
    return logs, strategy.model().state_dict()


def every_state(make: Make, recipe: Recipe, experiences: Sequence[Any]) -> list[tuple[int, State]]:
    """What was learned before, and the state, at each tick of a run."""
    states: list[tuple[int, State]] = []
    strategy = made(make, context(recipe, lambda state: states.append((strategy.experience.index, written(state)))))
    for experience in experiences:
        strategy.learn(experience)
    return states


def made(make: Make, run: RunContext) -> Any:
    """Inside a fence, as the runner makes it."""
    with run.global_rng("global"):
        return make(run)


def assert_resumes(make: Make, recipe: Recipe, experiences: Sequence[Any]) -> None:
    """From each state of a run, a new strategy comes to the same end, bit for bit."""
    logs, weights = finish(made(make, context(recipe)), experiences, 0)
    states = every_state(make, recipe, experiences)
    assert len(states) == len(experiences) * recipe.epochs * math.ceil(len(experiences[0].train) / recipe.batch_size)
    for learned, state in states:
        strategy = made(make, context(recipe))
        strategy.load(state)
        resumed_logs, resumed = finish(strategy, experiences, learned)
        assert resumed_logs == logs[learned:]
        assert all(torch.equal(resumed[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["sgd", "er", "er-ace", "der++", "bgs", "gdro"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_goes_on_from_each_of_its_states_bit_for_bit(
    registry: Registry, stream: Stream, name: str, optimizer: Literal["sgd", "adam"]
) -> None:
    spec = registry.strategies[name]
    recipe = Recipe(epochs=2, batch_size=24, lr=0.01, optimizer=optimizer, augment="shift")
    assert_resumes(lambda run: spec.build(spec.config(), run), recipe, stream.folds[0].train)  # type: ignore[arg-type, return-value]


class Everything(TrainingStrategy[NoKnobs]):
    """Holds all that a checkpoint can hold, half of it born during training, and lets all of it decide about the loss."""

    def __init__(self, config: NoKnobs, run: RunContext) -> None:
        super().__init__(config, run)
        self.clusters = Heads(run, "clusters")
        self.buffers = [ReservoirBuffer(8), ReservoirBuffer(8)]
        self.projector = nn.Linear(self.net.width, 3)
        self.temperature = nn.Parameter(torch.ones(()))
        self.alias = self.net.head(1)
        self.draws = torch.ones(48)
        self.history: list[tuple[int, float]] = []
        self.table: dict[Any, Any] = {}
        self.passing = "x"

    def before_experience(self, experience: DataExperience) -> None:
        self.clusters.add(f"of {experience.index}", self.net.width, 3)
        self.teacher = self.context.new_model().requires_grad_(False).eval()
        self.student = self.net  # another name for the same
        self.table[(experience.index, "scale")] = [torch.full((2,), 1.5), None, True]
        if experience.index:
            self.net.backbone.requires_grad_(False)
            self.net.backbone.eval()
            del self.passing

    def before_epoch(self, epoch: int) -> None:
        self.noise = torch.randn(3)  # of the global generator

    def order(self, experience: DataExperience, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.draws, len(self.draws), generator=generator)

    def loss(self, batch: Batch) -> Tensor:
        features = F.dropout(self.features(batch.x), 0.2)
        logits = self.student.classify(features, batch.task) * self.temperature
        cluster = self.clusters(features, f"of {self.experience.index}") + self.projector(features) + self.noise
        with torch.no_grad():
            distance = (self.teacher(batch.x, batch.task) - logits.detach()).square().mean()
        scale = self.table[(self.experience.index, "scale")][0][0]
        memory = len(self.buffers[1]) and as_float(self.buffers[1].sample(4, self.generator("memory")).x).mean()
        loss: Tensor = F.cross_entropy(logits, batch.y) + scale * F.cross_entropy(cluster, batch.y) * (1 + distance) * (
            1 + memory
        )
        self.draws[batch.index] /= 4  # the next order depends on it, the one of this epoch must not
        self.history.append((self.step, float(loss.detach())))
        recent = sum(value for _, value in self.history[-3:])
        penalty: Tensor = self.temperature * self.projector(features).square().mean()
        return loss + 0.01 * recent * penalty * (2 if hasattr(self, "passing") else 1)

    def after_step(self, batch: Batch) -> None:
        for buffer in self.buffers:
            buffer.add(self.stored(batch), batch.y, batch.task, self.generator("buffer"))


def test_all_that_a_checkpoint_can_hold_comes_back_also_what_was_born_during_training(stream: Stream) -> None:
    recipe = Recipe(epochs=2, batch_size=16, lr=0.01, optimizer="adam", clip_norm=1.0)
    assert_resumes(lambda run: Everything(NoKnobs(), run), recipe, stream.folds[0].train)


def test_the_optimizer_gets_every_trainable_parameter_once(data: DataExperience) -> None:
    strategy = Everything(NoKnobs(), context())
    strategy.learn(data)
    held = [*strategy.net.parameters(), *strategy.clusters.parameters(), *strategy.projector.parameters(), strategy.temperature]
    assert {id(parameter) for parameter in strategy.parameters()} == {id(parameter) for parameter in held}
    assert len(list(strategy.parameters())) == len(held)
    strategy.net.requires_grad_(False)
    assert len(list(strategy.parameters())) == len(held) - len(list(strategy.net.parameters()))


class Holder(Plain):
    """Holds in an attribute what the test says, from the start or from the first experience on."""

    def __init__(self, config: NoKnobs, run: RunContext, early: Any, late: Any) -> None:
        super().__init__(config, run)
        self.late = late
        if early is not None:
            self.held = early()

    def before_experience(self, experience: DataExperience) -> None:
        if self.late is not None:
            self.held = self.late()
        self.late = None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda: {"a": [object()]}, r"held\['a'\]\[0\]. holds a object"),
        (lambda: {1, 2}, "held' holds a set"),
        (lambda: torch.Generator(), "held' holds a Generator"),
        (lambda: torch.zeros(1).numpy(), "held' holds a ndarray"),
        (lambda: torch.zeros(1).double().numpy()[0], "held' holds a float64"),
        (lambda: torch.zeros(2, 3).shape, "held' holds a Size"),
        (lambda: RECIPE, "held' holds a Recipe"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_an_error_at_the_first_tick_that_names_it(
    data: DataExperience, value: Callable[[], Any], kind: str
) -> None:
    run = context(RECIPE)
    run._checkpointer = Checkpointer(lambda _: None)  # none is due for half a minute
    with pytest.raises(TypeError, match=rf"attribute .{kind}, which a checkpoint cannot"):
        Holder(NoKnobs(), run, value, None).learn(data)
    assert run.cost.optimizer_steps == 1


@pytest.mark.parametrize(
    ("early", "late", "path"),
    [
        (None, lambda: ReservoirBuffer(3), "held"),
        (lambda: None, lambda: nn.Linear(1, 1), "held"),
        (list, lambda: [ReservoirBuffer(3)], r"held\[0\]"),
        (dict, lambda: {"a": (1, ReservoirBuffer(3))}, r"held\['a'\]\[1\]"),
    ],
)
def test_an_object_born_during_training_is_an_error_at_the_first_tick_that_says_where_to_make_it(
    data: DataExperience, early: Any, late: Callable[[], Any], path: str
) -> None:
    run = context(RECIPE, lambda _: None)
    with pytest.raises(TypeError, match=rf"attribute .{path}.: make it in __init__, so that a checkpoint can be loaded"):
        Holder(NoKnobs(), run, early, late).learn(data)


def test_without_checkpoints_a_strategy_may_hold_what_it_likes(data: DataExperience) -> None:
    strategy = Holder(NoKnobs(), context(), lambda: {1, 2}, lambda: ReservoirBuffer(3))
    assert strategy.learn(data)["loss"] > 0


def test_a_state_is_only_numbers_strings_lists_dicts_and_tensors(stream: Stream) -> None:
    def check(value: Any) -> None:
        assert type(value) in (int, float, str, bool, type(None)) or isinstance(value, Tensor | list | dict | tuple)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            check(item)

    for _, state in every_state(lambda run: Everything(NoKnobs(), run), RECIPE, stream.folds[0].train[:1]):
        check(state)


def test_a_strategy_that_learns_two_tasks_answers_each_with_its_own_head(stream: Stream) -> None:
    strategy = Plain(NoKnobs(), context())
    for experience in stream.folds[0].train:
        assert isinstance(experience, DataExperience)
        other = {
            name: t.clone() for name, t in strategy.net.state_dict().items() if name.startswith(f"heads.{1 - experience.task}")
        }
        strategy.learn(experience)
        assert all(torch.equal(strategy.net.state_dict()[name], tensor) for name, tensor in other.items())
