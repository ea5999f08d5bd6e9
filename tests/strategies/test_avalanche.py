"""The Avalanche bridge against avalanche-lib itself and against our own training loop."""

from __future__ import annotations

import io
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import TextLogger
from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule, avalanche_forward
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.supervised import MAS, MER, Naive
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import (
    ArrayData,
    DataExperience,
    EvalSet,
    Fold,
    InputError,
    Model,
    Recipe,
    RunContext,
    StrategySpec,
    Stream,
    evaluating,
)
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import Cost
from shiftproof.benchmark.contracts import Resumable
from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.benchmark.evaluation import evaluate
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.records import RunRecord, RunRequest
from shiftproof.benchmark.registry.discovery import Entry
from shiftproof.benchmark.registry.loading import load_entry
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.runner import build_stream, make_cell, run_cell
from shiftproof.datasets.digits import BiasedDigitsConfig, DigitsConfig, biased_digits, biased_experience, split_digits
from shiftproof.strategies import LossBinnedBuffer
from shiftproof.strategies.avalanche import (
    AvalancheParts,
    AvalancheStrategy,
    LossBinnedStorage,
    missing,
    shiftproof_strategies,
    to_avalanche,
)
from shiftproof.strategies.baselines.fine_tuning import FineTuning, FineTuningConfig
from shiftproof.strategies.baselines.rehearsal import ExperienceReplay, ReplayConfig
from shiftproof.strategies.optimizers import learning_rate

SPECS: Mapping[str, StrategySpec[Any]] = {spec.name: spec for spec in shiftproof_strategies()}
ALL = pytest.mark.parametrize("name", SPECS)
SAMPLES = 48
CPU = torch.device("cpu")


def cut(data: ArrayData, count: int = SAMPLES) -> ArrayData:
    return ArrayData(data.x[:count], data.y[:count])


def thinned(eval_set: EvalSet, step: int = 8) -> EvalSet:
    ((task, data),) = eval_set.parts
    return EvalSet(
        eval_set.name, ((task, ArrayData(data.x[::step], data.y[::step])),), eval_set.groups[::step], eval_set.group_names
    )


def small(stream: Stream, **recipe: Any) -> Stream:
    """The first two experiences of a stream, a few samples of each."""
    train = [
        DataExperience(e.index, e.name, e.task, cut(e.train)) for e in stream.folds[0].train if isinstance(e, DataExperience)
    ]
    fold = Fold("all", tuple(train[:2]), tuple(thinned(one) for one in stream.folds[0].evals[:2]))
    return replace(stream, folds=(fold,), recipe=Recipe(**{"epochs": 1, "batch_size": 16, **recipe}))


def two_heads(**recipe: Any) -> Stream:
    return small(biased_digits(BiasedDigitsConfig(size=8)), **recipe)


def shared_head(**recipe: Any) -> Stream:
    return small(split_digits(True, DigitsConfig(size=8)), **recipe)


def experiences(stream: Stream) -> list[DataExperience]:
    return [one for one in stream.folds[0].train if isinstance(one, DataExperience)]


def make_context(stream: Stream, tmp_path: Path, seed: int = 0) -> RunContext:
    def base() -> tuple[Model, StateDict]:
        torch.manual_seed(0)
        model = Model(SmallConvNet(stream.input_shape), stream.heads)
        return model, {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}

    return RunContext(seed, stream.recipe, base, "base", Cache(tmp_path / "cache"), tmp_path / "work")


def make(name: str, stream: Stream, tmp_path: Path, seed: int = 0, **knobs: Any) -> AvalancheStrategy[Any]:
    spec = SPECS[name]
    strategy = spec.build(spec.config(**knobs), make_context(stream, tmp_path, seed))
    assert isinstance(strategy, AvalancheStrategy)
    return strategy


def learned(name: str, stream: Stream, tmp_path: Path, seed: int = 0, **knobs: Any) -> StateDict:
    strategy = make(name, stream, tmp_path, seed, **knobs)
    for experience in experiences(stream):
        strategy.learn(experience)
    return strategy.model().state_dict()


def same(first: StateDict, second: StateDict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def draw_all() -> tuple[float, float, float]:
    return torch.rand(1).item(), float(np.random.rand()), random.random()


# What every strategy has in common


def test_specs_and_their_code_are_read_without_importing_avalanche() -> None:
    code = (
        "import sys, shiftproof.strategies.avalanche as a\n"
        "from shiftproof.benchmark.codehash import code_sha256\n"
        "specs = a.shiftproof_strategies()\n"
        "print(len(specs), len({code_sha256(spec.build.__module__) for spec in specs}), 'avalanche' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(SPECS)), "1", "False"]


def test_a_strategy_whose_packages_are_absent_says_what_to_install() -> None:
    assert missing("avalanche", "quadprog") == ""
    assert missing("avalanche", "no_such_module") == "needs no_such_module, which is not installed: pip install no_such_module"
    assert all(spec.unavailable == "" and "arXiv" in spec.reference for spec in SPECS.values())


@ALL
def test_two_runs_are_equal_bit_for_bit_whatever_is_drawn_around_them(name: str, tmp_path: Path) -> None:
    stream = two_heads()
    runs = []
    for start in (1, 2):
        seed_all(start)
        strategy = make(name, stream, tmp_path)
        for experience in experiences(stream):
            strategy.learn(experience)
            draw_all()
        runs.append(strategy.model().state_dict())
    assert same(runs[0], runs[1])
    assert not same(runs[0], learned(name, stream, tmp_path, seed=1))


def test_learning_leaves_the_global_generators_as_they_were(tmp_path: Path) -> None:
    seed_all(3)
    expected = draw_all()
    seed_all(3)
    learned("avalanche-agem", two_heads(), tmp_path)
    assert draw_all() == expected


@ALL
def test_learns_where_all_tasks_share_a_head(name: str, tmp_path: Path) -> None:
    stream = shared_head(epochs=2)
    strategy = make(name, stream, tmp_path)
    losses = [strategy.learn(experience)["loss"] for experience in experiences(stream)]
    counts = evaluate(strategy.model(), stream.folds[0].evals, CPU)
    assert all(0 < loss < 10 for loss in losses)
    assert all(len(one.classes) <= 10 and sum(total for _, total in one.groups) > 0 for one in counts)


@ALL
def test_a_loss_that_is_not_a_number_ends_the_cell(name: str, tmp_path: Path) -> None:
    stream = two_heads()
    strategy = make(name, stream, tmp_path)
    first, second = experiences(stream)
    strategy.learn(first)
    with torch.no_grad():
        next(strategy.model().parameters()).fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="expected a finite loss, got nan in step 0"):
        strategy.learn(second)


def contradiction(stream: Stream) -> tuple[DataExperience, DataExperience]:
    """An experience, and the same one with every label turned round: what is learned from it is at the cost of the first."""
    first = experiences(stream)[0]
    return first, replace(first, index=1, train=ArrayData(first.train.x, 1 - first.train.y))


def mean_loss(model: Model, experience: DataExperience) -> float:
    return float(losses_by_hand(model, experience).mean())


def losses_by_hand(net: Model, experience: DataExperience) -> Tensor:
    with evaluating(net), torch.no_grad():
        return F.cross_entropy(net(experience.train.inputs(slice(None)), experience.task), experience.train.y, reduction="none")


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("avalanche-replay", {}),
        ("avalanche-ewc", {"ewc_lambda": 4e5}),  # so little was learned that its default strength does not show
        ("avalanche-lwf", {}),
        ("avalanche-agem", {}),
        ("avalanche-gem", {}),
    ],
)
def test_what_contradicts_an_experience_harms_it_less_than_in_fine_tuning(
    name: str, knobs: dict[str, Any], tmp_path: Path
) -> None:
    stream = two_heads(optimizer="adam", lr=0.01, schedule="constant", epochs=12)
    first, second = contradiction(stream)
    strategies = [make("avalanche-naive", stream, tmp_path), make(name, stream, tmp_path, **knobs)]
    losses = []
    for experience in (first, second):
        for strategy in strategies:
            strategy.learn(experience)
        losses.append([mean_loss(strategy.model(), first) for strategy in strategies])
    assert losses[0][0] == losses[0][1]  # nothing to remember yet
    assert losses[1][0] > 1.2 * losses[1][1]


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("avalanche-ewc", {"ewc_lambda": 0.0}),
        ("avalanche-ewc", {"ewc_lambda": 0.0, "mode": "online"}),
        ("avalanche-lwf", {"alpha": 0.0}),
    ],
)
def test_without_its_strength_a_regularizer_is_fine_tuning(name: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    stream = two_heads()
    naive, other = learned("avalanche-naive", stream, tmp_path), learned(name, stream, tmp_path, **knobs)
    assert all(torch.allclose(naive[key], other[key], atol=1e-6) for key in naive)


# The recipe


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.0, "weight_decay": 0.01, "schedule": "constant"},
        {"clip_norm": 0.05, "warmup_steps": 3},
        {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.1},
        {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize("make_stream", [two_heads, shared_head])
def test_with_one_batch_an_epoch_naive_equals_our_fine_tuning(
    make_stream: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    # With all samples in a batch their order does not matter, so that two loops can be compared at all.
    stream = make_stream(batch_size=SAMPLES, epochs=6, **changes)
    ours, theirs = FineTuning(FineTuningConfig(), make_context(stream, tmp_path)), make("avalanche-naive", stream, tmp_path)
    for experience in experiences(stream):
        logs = [dict(strategy.learn(experience)) for strategy in (ours, theirs)]
        assert logs[0] == pytest.approx(logs[1], abs=1e-4)
    start, expected, found = (s.state_dict() for s in (ours.context.new_model(), ours.net, theirs.model()))
    moved = max(float((expected[key] - start[key]).abs().max()) for key in start)
    assert all(torch.allclose(expected[key], found[key], atol=1e-2 * moved) for key in start)


class Recorded(AvalancheStrategy[None]):
    """Fine-tuning with replay that takes notes."""

    def template(self, parts: AvalancheParts) -> Naive:
        self.rates: list[float] = []
        self.inputs: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()
        parts["plugins"] += [ReplayPlugin(20), self]
        return Naive(**parts)

    def after_forward(self, template: Naive, **_: Any) -> None:
        self.inputs.append(template.mb_x)
        self.dtypes.add(template.mb_output.dtype)

    def after_update(self, template: Naive, **_: Any) -> None:
        self.rates += [group["lr"] for group in template.optimizer.param_groups]


def test_every_step_has_the_learning_rate_of_the_recipe_and_each_experience_starts_anew(tmp_path: Path) -> None:
    stream = two_heads(epochs=3, batch_size=20, warmup_steps=2, lr=0.01)
    strategy = Recorded(None, make_context(stream, tmp_path))
    for experience in experiences(stream):
        strategy.learn(experience)
    steps = 3 * 3  # epochs times ceil(48 / 20), also where the memory doubles the batch
    assert strategy.rates == 2 * [learning_rate(stream.recipe, step, steps) for step in range(steps)]
    assert [len(x) for x in strategy.inputs] == 3 * [20, 20, 8] + 3 * [40, 40, 28]


@pytest.mark.parametrize(("kind", "unaltered"), [("none", 1.0), ("shift", 1 / 9), ("crop-flip", 0.0)])
def test_augmentation_reaches_the_stream_and_what_is_replayed(kind: str, unaltered: float, tmp_path: Path) -> None:
    stream = two_heads(augment=kind, epochs=4)
    strategy = Recorded(None, make_context(stream, tmp_path))
    for experience in experiences(stream):
        strategy.learn(experience)
    for part in (slice(0, 16), slice(16, None)):  # in a step with replay, the stream comes first
        seen = torch.cat([x[part] for x in strategy.inputs[-12:]])
        stored = torch.cat([one.train.inputs(slice(None)) for one in experiences(stream)])
        share = (seen.flatten(1)[:, None] == stored.flatten(1)).all(2).any(1).float().mean().item()
        assert share == pytest.approx(unaltered, abs=0.1)


def test_bfloat16_is_used_inside_the_network_and_the_loss_is_float32(tmp_path: Path) -> None:
    stream = two_heads(precision="bfloat16")
    strategy = Recorded(None, make_context(stream, tmp_path))
    inside: set[torch.dtype] = set()
    strategy.model().backbone.register_forward_hook(lambda _module, _inputs, output: inside.add(output.dtype))
    strategy.learn(experiences(stream)[0])
    assert (inside, strategy.dtypes) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.parametrize(
    ("name", "ours", "config"),
    [("avalanche-naive", FineTuning, FineTuningConfig()), ("avalanche-replay", ExperienceReplay, ReplayConfig())],
)
def test_cost_is_counted_as_in_our_own_strategies(name: str, ours: Any, config: Any, tmp_path: Path) -> None:
    stream = two_heads(epochs=3, batch_size=20)
    strategies = [make(name, stream, tmp_path), ours(config, make_context(stream, tmp_path))]
    for strategy in strategies:
        for experience in experiences(stream):
            strategy.learn(experience)
    assert [strategy.context.cost for strategy in strategies] == 2 * [Cost(samples_seen=2 * 3 * 48, optimizer_steps=2 * 3 * 3)]


# Strategies of strangers


class Synapses(AvalancheStrategy[None]):
    """Memory aware synapses, which is not registered here."""

    def template(self, parts: AvalancheParts) -> MAS:
        return MAS(**parts, lambda_reg=1.0)


def test_another_strategy_of_avalanche_takes_three_lines(tmp_path: Path) -> None:
    stream = two_heads()
    strategy = Synapses(None, make_context(stream, tmp_path))
    logs = [strategy.learn(experience) for experience in experiences(stream)]
    assert all(np.isfinite(one["loss"]) for one in logs)
    assert not isinstance(strategy, Resumable)


def test_a_template_that_drops_the_recipe_is_refused(tmp_path: Path) -> None:
    class Own(AvalancheStrategy[None]):
        def template(self, parts: AvalancheParts) -> Naive:
            model = parts["model"]
            return Naive(model=model, optimizer=torch.optim.Adam(model.parameters()), train_mb_size=4, train_epochs=1)

    with pytest.raises(InputError, match=r"got one with its own optimizer, train_mb_size, plugins; make it with \*\*parts"):
        Own(None, make_context(two_heads(), tmp_path))


def test_a_loop_that_the_recipe_cannot_reach_is_refused(tmp_path: Path) -> None:
    class Meta(AvalancheStrategy[None]):
        def template(self, parts: AvalancheParts) -> MER:
            return MER(**parts, mem_size=8)

    stream = two_heads()
    with pytest.raises(InputError, match="MER: expected a loop that calls before_update"):
        Meta(None, make_context(stream, tmp_path)).learn(experiences(stream)[0])


# Whole cells


def run(tmp_path: Path, strategy: str, stream: str) -> RunRecord:
    registry = Registry()
    modules = ("benchmark.backbones", "benchmark.metrics", "datasets.digits", "strategies.avalanche")
    for module in modules:
        registry.add(load_entry(Entry(module, f"shiftproof.{module}", "shiftproof", "0")))
    recipe = (("epochs", "1"), ("batch_size", "64"))
    request = RunRequest(strategy, stream, seed=0, knobs=(("size", "8"),), recipe=recipe, base=(("kind", "random"),))
    return run_cell(
        make_cell(registry, request, build_stream(registry, request)), registry, tmp_path, Cache(tmp_path / "cache")
    )


@pytest.mark.parametrize(
    ("stream", "rows", "columns"), [("split-digits", 5, 5), ("split-digits-class", 5, 5), ("digits-offline-prime", 1, 1)]
)
def test_a_cell_runs_on_streams_measured_after_each_experience_or_at_the_end(
    stream: str, rows: int, columns: int, tmp_path: Path
) -> None:
    record = run(tmp_path, "avalanche-lwf", stream)
    assert (record.status, record.error) == ("finished", None)
    assert record.results is not None
    assert (len(record.results["counts"]), len(record.results["counts"][0])) == (rows, columns)


def test_a_cell_gives_the_same_results_after_other_cells(tmp_path: Path) -> None:
    first = run(tmp_path / "first", "avalanche-replay", "digits-offline-even")
    run(tmp_path / "between", "avalanche-agem", "digits-offline-even")
    second = run(tmp_path / "second", "avalanche-replay", "digits-offline-even")
    assert first.results_sha256 == second.results_sha256 is not None


# Our streams in Avalanche


class Heads(MultiTaskModule):  # type: ignore[misc]
    """A multi-head model as an Avalanche user writes it: nothing of ours but the weights."""

    def __init__(self, net: Model) -> None:
        super().__init__()
        self.net = net

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        return self.net(x, task_label)  # type: ignore[no-any-return]


def avalanche_naive(model: nn.Module, *plugins: Any) -> Naive:
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[TextLogger(io.StringIO())])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return Naive(model=model, optimizer=optimizer, train_mb_size=16, train_epochs=3, plugins=list(plugins), evaluator=evaluator)


def test_avalanche_trains_on_our_stream_and_finds_our_accuracy(tmp_path: Path) -> None:
    stream = two_heads()
    benchmark = to_avalanche(stream)
    net = make_context(stream, tmp_path).new_model()
    strategy = avalanche_naive(Heads(net))
    for experience in benchmark.train_stream:
        strategy.train(experience)
        found = strategy.eval(benchmark.test_stream)
        expected = [one.groups for one in evaluate(net, stream.folds[0].evals, CPU)]
        for number, groups in enumerate(expected):
            accuracy = sum(correct for correct, _ in groups) / sum(total for _, total in groups)
            assert found[f"Top1_Acc_Exp/eval_phase/test_stream/Task00{number}/Exp00{number}"] == pytest.approx(accuracy)
    assert len(set(expected)) > 1  # the comparison had something to compare


def test_an_avalanche_benchmark_holds_inputs_targets_and_task_labels_and_nothing_else() -> None:
    stream = two_heads()
    benchmark = to_avalanche(stream)
    for ours, theirs in zip(experiences(stream), benchmark.train_stream, strict=True):
        assert set(theirs.dataset._data_attributes) == {"targets", "targets_task_labels"}
        x, y, task = next(iter(torch.utils.data.DataLoader(theirs.dataset, batch_size=SAMPLES)))
        assert torch.equal(x, ours.train.inputs(slice(None)))
        assert torch.equal(y, ours.train.y)
        assert torch.equal(task, ours.tasks(torch.arange(SAMPLES)))


def test_where_tasks_share_a_head_their_label_is_0_and_avalanche_knows_the_classes() -> None:
    benchmark = to_avalanche(replace(shared_head(), heads={3: 10}))
    first, second = benchmark.train_stream
    assert (first.task_labels, second.task_labels) == ([0], [0])
    assert (second.classes_in_this_experience, second.previous_classes) == ([2, 3], {0, 1})


class OwnHeads(MultiTaskModule):  # type: ignore[misc]
    """Our backbone under Avalanche's classifier for a head each."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.backbone = SmallConvNet(stream.input_shape)
        self.classifier = MultiHeadClassifier(self.backbone.features)

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.backbone(x), task_labels)
        return logits


def shared_own_head(stream: Stream) -> nn.Module:
    """Our backbone under Avalanche's classifier that grows with the classes."""
    backbone = SmallConvNet(stream.input_shape)
    return nn.Sequential(backbone, IncrementalClassifier(backbone.features))


@pytest.mark.parametrize(("build", "make_stream"), [(OwnHeads, two_heads), (shared_own_head, shared_head)])
def test_avalanches_own_heads_learn_our_stream_with_its_replay(
    build: Callable[[Stream], nn.Module], make_stream: Callable[..., Stream]
) -> None:
    stream = make_stream()
    benchmark = to_avalanche(stream)
    seed_all(0)
    strategy = avalanche_naive(build(stream), ReplayPlugin(SAMPLES))
    strategy.train_epochs = 30
    with warnings.catch_warnings(record=True):  # Avalanche warns about itself
        for experience in benchmark.train_stream:
            strategy.train(experience)
    found = strategy.eval(benchmark.train_stream)
    accuracies = [value for name, value in found.items() if name.startswith("Top1_Acc_Exp/")]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.8


def test_an_eval_set_of_several_tasks_keeps_each_samples_label() -> None:
    stream = two_heads()
    first, second = stream.folds[0].evals
    both = EvalSet("both", first.parts + second.parts, torch.cat([first.groups, second.groups]), first.group_names)
    (experience,) = to_avalanche(replace(stream, folds=(replace(stream.folds[0], evals=(both,)),))).test_stream
    labels = torch.tensor(list(experience.dataset.targets_task_labels))
    assert torch.equal(labels, torch.cat([torch.full((len(first.groups),), 0), torch.full((len(second.groups),), 1)]))


def test_an_unknown_fold_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(InputError, match="expected a fold among all, got 'clipart'"):
        to_avalanche(two_heads(), "clipart")


# Our buffer in Avalanche


@pytest.mark.parametrize("kind", ["none", "shift"])
def test_avalanches_replay_keeps_what_the_loss_binned_buffer_decides(kind: str, tmp_path: Path) -> None:
    stream = two_heads(augment=kind)
    net = make_context(stream, tmp_path).new_model()
    storage = LossBinnedStorage(16, bins=4)
    strategy = avalanche_naive(Heads(net), ReplayPlugin(16, storage_policy=storage))
    expected = LossBinnedBuffer(16, bins=4)
    for ours, theirs in zip(experiences(stream), to_avalanche(stream).train_stream, strict=True):
        strategy.train(theirs)
        position = torch.arange(SAMPLES)
        losses = losses_by_hand(net, ours)
        expected.populate(position, ours.train.y, ours.tasks(position), losses, torch.Generator().manual_seed(0))
        assert torch.equal(storage.chosen.composition(), expected.composition())
        assert len(storage.buffer) == int(expected.composition().sum()) > 0
        assert net.training
    for (x, y, task), position, number in zip(
        storage.buffer.eval(), storage.chosen.contents().x, storage.chosen.contents().extras["experience"], strict=True
    ):
        origin = experiences(stream)[int(number)]
        assert torch.equal(x, origin.train.inputs(slice(None))[position])
        assert (y, task) == (int(origin.train.y[position]), origin.task)


def test_samples_against_the_bias_are_over_represented(tmp_path: Path) -> None:
    stream = biased_digits(BiasedDigitsConfig(size=8))
    groups = biased_experience(0, BiasedDigitsConfig(size=8)).groups
    is_conflicting = (groups == 1) | (groups == 2)  # label 0 in the ink of 1, and the other way round
    storage, reservoir = LossBinnedStorage(64), ReservoirSamplingBuffer(64)
    strategy = avalanche_naive(Heads(make_context(stream, tmp_path).new_model()), ReplayPlugin(64, storage_policy=storage))
    experience = to_avalanche(stream).train_stream[0]
    torch.manual_seed(0)
    strategy.train(experience)
    reservoir.update_from_dataset(experience.dataset)
    kept = {tuple(x.flatten().tolist()) for x, *_ in reservoir.buffer}
    by_chance = [
        bool(c) for (x, *_), c in zip(experience.dataset, is_conflicting, strict=True) if tuple(x.flatten().tolist()) in kept
    ]
    share = is_conflicting[storage.chosen.contents().x].float().mean().item()
    assert share > 0.2 > 2 * np.mean(by_chance)


def test_a_smaller_storage_keeps_each_experiences_share(tmp_path: Path) -> None:
    stream = two_heads()
    storage = LossBinnedStorage(32, bins=2, redistribute=True)
    strategy = avalanche_naive(Heads(make_context(stream, tmp_path).new_model()), ReplayPlugin(32, storage_policy=storage))
    storage.resize(strategy, 32)
    strategy.train(to_avalanche(stream).train_stream)
    before = storage.chosen.composition()
    storage.resize(strategy, 8)
    assert (before.sum(1).tolist(), storage.chosen.composition().sum(1).tolist()) == ([16, 16], [4, 4])
    assert (len(storage.buffer), storage.max_size) == (8, 8)
    storage.resize(strategy, 100)
    assert (len(storage.buffer), storage.chosen.capacity) == (8, 100)
    with pytest.raises(InputError, match="at least one sample for each of 2 experiences, got 1"):
        storage.resize(strategy, 1)


def test_losses_are_those_of_avalanches_own_forward(tmp_path: Path) -> None:
    stream = shared_head()
    net = make_context(stream, tmp_path).new_model()
    model = nn.Sequential(net.backbone, net.head(0))  # no task labels at all
    storage = LossBinnedStorage(16, bins=1)
    avalanche_naive(model, ReplayPlugin(16, storage_policy=storage)).train(to_avalanche(stream).train_stream[0])
    x = experiences(stream)[0].train.inputs(slice(None))
    assert torch.equal(avalanche_forward(model, x, None), net(x, 0))
    assert storage.chosen.composition().tolist() == [[16]]
