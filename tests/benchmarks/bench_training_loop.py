"""How fast our training loop is beside a bare PyTorch loop and beside Avalanche's, and whether replay slows down with tasks.

    python tests/benchmarks/bench_training_loop.py

Data, backbone and recipe are those of `b-digits`, of whose epochs a few suffice; one torch thread. Each figure is the median of
five alternating pairs (A B A B ...), by the clock and by processor time; on a busy machine neither says much. Both sides of a
pair take the same number of steps with the same batch sizes, of stream and memory alike. The bare loop also takes the same
batches and ends at the same weights, which is checked. Avalanche reads the same uint8 pictures, and in lines of their own
pictures that were converted to float32 beforehand; its learning rate stays constant, but it clips gradients where we do. Its
Replay answers with its own multi-head classifier, and in lines of their own with our heads, which are faster.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import ArrayData, DataExperience, Model, Recipe, RunContext, Stream
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import State
from shiftproof.benchmark.experiences import StateDict
from shiftproof.datasets.digits import BiasedDigitsConfig, DigitsConfig, biased_digits, split_digits
from shiftproof.strategies.avalanche import to_avalanche
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from shiftproof.strategies.baselines.rehearsal import ExperienceReplay, ReplayConfig
from shiftproof.strategies.optimizers import learning_rate

PAIRS = 5
EPOCHS = 12  # of the recipe's; a step costs the same in each
Prepare = Callable[[], Callable[[], Any]]
"""Sets up one side of a pair; what it returns is timed."""


@dataclass(frozen=True)
class Pairs:
    """Seconds of both sides of every pair, by the clock and by processor time."""

    wall: Sequence[tuple[float, float]]
    cpu: Sequence[tuple[float, float]]

    @property
    def by_clock(self) -> float:
        """Median of first / second."""
        return median(first / second for first, second in self.wall)

    @property
    def by_processor(self) -> float:
        """Median of first / second."""
        return median(first / second for first, second in self.cpu)


def alternate(first: Prepare, second: Prepare, pairs: int = PAIRS) -> Pairs:
    """Time both sides in turn; a round that is not counted comes first."""
    wall, cpu = [], []
    for _ in range(pairs + 1):
        timed = [measure(first()), measure(second())]
        wall.append((timed[0][0], timed[1][0]))
        cpu.append((timed[0][1], timed[1][1]))
    return Pairs(wall[1:], cpu[1:])


def measure(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def report(what: str, pairs: Pairs, target: str, steps: int) -> None:
    """One line."""
    milliseconds = [1000 * median(side) / steps for side in zip(*pairs.cpu, strict=True)]
    print(
        f"{what:56s} {pairs.by_clock:6.2f}x by the clock {pairs.by_processor:6.2f}x by processor   {target or 'no':>7s} target"
        f"   ({milliseconds[0]:.2f} and {milliseconds[1]:.2f} ms of processor a step)",
        flush=True,
    )


def make_context(stream: Stream, folder: Path) -> RunContext:
    """Random weights do as well as pre-trained ones: no pass costs more or less."""

    def base() -> tuple[Model, StateDict]:
        model = Model(SmallConvNet(stream.input_shape), stream.heads)
        return model, {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}

    return RunContext(0, stream.recipe, base, "", Cache(folder), folder)


def experiences(stream: Stream) -> list[DataExperience]:
    """Without group labels."""
    return [one.without_groups() for one in stream.folds[0].train]  # type: ignore[union-attr]


def steps_of(experience: DataExperience, recipe: Recipe) -> int:
    """Optimizer steps of an experience."""
    return recipe.epochs * -(-len(experience.train) // recipe.batch_size)


def bare_loop(net: Model, experience: DataExperience, context: RunContext) -> None:
    """What anybody would write for this recipe: no hooks, no memory, no checkpoints, no check of the loss."""
    recipe, data, task = context.recipe, experience.train, experience.task
    optimizer = plain_sgd(net, recipe)
    total, done = steps_of(experience, recipe), 0
    net.train()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(data), generator=context.generator("order", experience.index, epoch))
        for index in order.split(recipe.batch_size):
            x, y = data.x[index].float().div_(255), data.y[index]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, done, total)
            step(net, optimizer, recipe, x, y, task)
            done += 1


def plain_sgd(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer as anybody would write it."""
    return torch.optim.SGD(net.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)


def step(net: Model, optimizer: torch.optim.Optimizer, recipe: Recipe, x: Tensor, y: Tensor, task: int | Tensor) -> None:
    """Forward, backward, clipping and step."""
    loss = F.cross_entropy(net(x, task), y)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe.clip_norm:
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
    optimizer.step()


def as_float32(stream: Stream) -> Stream:
    """Inputs as float32, so that Avalanche need not convert every sample."""
    train = tuple(
        DataExperience(one.index, one.name, one.task, ArrayData(one.train.inputs(slice(None)), one.train.y))
        for one in experiences(stream)
    )
    return replace(stream, folds=(replace(stream.folds[0], train=train),))


def plain(net: Model, task: int) -> nn.Module:
    """One task's network without heads to choose from: the least that Avalanche can call."""
    return nn.Sequential(net.backbone, net.head(task))


def with_our_heads(net: Model) -> nn.Module:
    """Our network as a multi-task module of Avalanche: one pass through the backbone, one product for all heads."""
    from avalanche.models import MultiTaskModule

    class OurHeads(MultiTaskModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            return self.net(x, task_labels)  # type: ignore[no-any-return]

    return OurHeads()


def with_own_heads(net: Model) -> nn.Module:
    """Our backbone under Avalanche's multi-head classifier, put together as its multi-task networks are."""
    from avalanche.models import MultiHeadClassifier, MultiTaskModule

    class OwnHeads(MultiTaskModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = net.backbone
            self.classifier = MultiHeadClassifier(net.backbone.features)

        def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
            return self.classifier(self.backbone(x), task_labels)  # type: ignore[no-any-return]

    return OwnHeads()


class Clipping:
    """The recipe's clipping as a plugin of Avalanche."""

    def __init__(self, recipe: Recipe) -> None:
        self.clip_norm = recipe.clip_norm

    def before_update(self, strategy: Any, **_: Any) -> None:
        """After the gradients, before the step."""
        nn.utils.clip_grad_norm_(strategy.model.parameters(), self.clip_norm)


def avalanche_naive(model: nn.Module, recipe: Recipe, *plugins: Any) -> Any:
    """Avalanche's loop with nothing switched on that it does not need."""
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.supervised import Naive

    return Naive(
        model=model,
        optimizer=plain_sgd(model, recipe),
        train_mb_size=recipe.batch_size,
        train_epochs=recipe.epochs,
        evaluator=EvaluationPlugin(),
        plugins=[*plugins, *([Clipping(recipe)] if recipe.clip_norm else [])],
    )


def against_bare_loop(stream: Stream, folder: Path) -> None:
    """Our step over a bare PyTorch step."""
    first = experiences(stream)[0]
    ended: list[StateDict] = []

    def ours() -> Callable[[], Any]:
        strategy = FineTuning(FineTuningConfig(), make_context(stream, folder))
        ended.append(strategy.net.state_dict())
        return lambda: strategy.learn(first)

    def bare() -> Callable[[], Any]:
        context = make_context(stream, folder)
        net = context.new_model()
        ended.append(net.state_dict())
        return lambda: bare_loop(net, first, context)

    pairs = alternate(ours, bare)
    if not all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0]):
        raise SystemExit("expected both loops to end at the same weights, got others: they do not do the same work")
    report("our step / a bare PyTorch step", pairs, "<= 1.10", steps_of(first, stream.recipe))


def against_avalanche_naive(stream: Stream, folder: Path) -> None:
    """Avalanche's Naive over our fine-tuning, on the first task."""
    first = experiences(stream)[0]

    def naive(experience: Any) -> Callable[[], Any]:
        strategy = avalanche_naive(plain(make_context(stream, folder).new_model(), first.task), stream.recipe)
        return lambda: strategy.train(experience)

    def ours() -> Callable[[], Any]:
        strategy = FineTuning(FineTuningConfig(), make_context(stream, folder))
        return lambda: strategy.learn(first)

    steps = steps_of(first, stream.recipe)
    for what, target, read in (("", ">= 1.20", stream), (", which reads float32", "", as_float32(stream))):
        theirs = to_avalanche(read).train_stream[0]
        report(f"Avalanche's Naive{what} / our fine-tuning", alternate(partial(naive, theirs), ours), target, steps)


def against_avalanche_replay(stream: Stream, folder: Path) -> None:
    """Avalanche's Replay over `er`, on the second task: on the first one Avalanche's memory is still empty."""
    from avalanche.training.plugins import ReplayPlugin

    first, second = experiences(stream)[:2]
    size = ReplayConfig().buffer_size

    def replay(build: Callable[[Model], nn.Module], experiences: Any) -> Callable[[], Any]:
        model = build(make_context(stream, folder).new_model())
        strategy = avalanche_naive(model, stream.recipe, ReplayPlugin(size, batch_size_mem=stream.recipe.batch_size))
        strategy.train_epochs = 1
        strategy.train(experiences[0])
        strategy.train_epochs = stream.recipe.epochs
        return lambda: strategy.train(experiences[1])

    saved = state_after(stream, [first], folder)
    steps = steps_of(second, stream.recipe)
    stored, converted = (to_avalanche(one).train_stream for one in (stream, as_float32(stream)))
    for what, target, build, read in (
        ("", ">= 1.70", with_own_heads, stored),
        (" with our heads", ">= 1.70", with_our_heads, stored),
        (" with our heads, float32", "", with_our_heads, converted),
    ):
        pairs = alternate(partial(replay, build, read), partial(replay_from, saved, second, stream, folder))
        report(f"Avalanche's Replay{what} / our er", pairs, target, steps)


def against_bare_passes(stream: Stream, folder: Path) -> None:
    """`er` over the passes, clipping and step alone, on pictures of two tasks that lie there: what no loop can save."""
    first, second = experiences(stream)[:2]
    recipe, steps = stream.recipe, steps_of(second, stream.recipe)
    saved = state_after(stream, [first], folder)

    def passes() -> Callable[[], Any]:
        net = make_context(stream, folder).new_model()
        optimizer = plain_sgd(net, recipe)
        generator = torch.Generator().manual_seed(0)
        batch = 2 * recipe.batch_size
        x = torch.rand(batch, *stream.input_shape, generator=generator)
        y, task = (torch.randint(2, (batch,), generator=generator) for _ in range(2))

        def run() -> None:
            net.train()
            for _ in range(steps):
                step(net, optimizer, recipe, x, y, task)

        return run

    pairs = alternate(partial(replay_from, saved, second, stream, folder), passes)
    report("our er / forward, backward and step alone", pairs, "", steps)


def last_task_against_first(stream: Stream, folder: Path) -> None:
    """A step of `er` in the last task over one in the first."""
    *earlier, last = experiences(stream)
    length = min(len(earlier[0].train), len(last.train))
    first, last = (replace(one, train=ArrayData(one.train.x[:length], one.train.y[:length])) for one in (earlier[0], last))
    nothing, saved = state_after(stream, [], folder), state_after(stream, earlier, folder)
    pairs = alternate(partial(replay_from, saved, last, stream, folder), partial(replay_from, nothing, first, stream, folder))
    what = f"er in task {len(earlier) + 1} / in task 1, {stream.name}"
    report(what, pairs, "<= 1.05", steps_of(first, stream.recipe))


def state_after(stream: Stream, earlier: Sequence[DataExperience], folder: Path) -> State:
    """What one epoch of each earlier task leaves in `er`."""
    short = replace(stream, recipe=replace(stream.recipe, epochs=1))
    strategy = ExperienceReplay(ReplayConfig(), make_context(short, folder))
    for one in earlier:
        strategy.learn(one)
    return strategy.state()


def replay_from(saved: State, experience: DataExperience, stream: Stream, folder: Path) -> Callable[[], Any]:
    """`er` on an experience."""
    strategy = ExperienceReplay(ReplayConfig(), make_context(stream, folder))
    strategy.load(copy.deepcopy(saved))  # a state shares tensors with who gave it and with who took it
    return lambda: strategy.learn(experience)


def main() -> None:
    """Print every figure."""
    torch.set_num_threads(1)
    streams = biased_digits(BiasedDigitsConfig()), split_digits(True, DigitsConfig())
    biased, shared = (replace(one, recipe=replace(one.recipe, epochs=EPOCHS)) for one in streams)
    print(
        f"b-digits, batches of {biased.recipe.batch_size}, {EPOCHS} epochs, median of {PAIRS} pairs, one thread, "
        f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} processors"
    )
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True):  # Avalanche warns about itself
        folder = Path(name)
        against_bare_loop(biased, folder)
        against_avalanche_naive(biased, folder)
        against_avalanche_replay(biased, folder)
        against_bare_passes(biased, folder)
        last_task_against_first(biased, folder)
        last_task_against_first(shared, folder)  # where a batch of many tasks is answered by one head
    print(f"load average at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
