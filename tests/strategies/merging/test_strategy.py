"""What every merge has in common: running statistics, counters, heads, and experts that come one by one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import ArrayData, DataExperience, ExpertExperience, Model, Recipe, RunContext
from shiftproof.benchmark.backbones import SmallConvNet, SmallResNet, SmallViT
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.lifting import needs_data, shared_names
from shiftproof.benchmark.registry.lookup import load_registry

REGISTRY = load_registry(("merging", "spectral-merging", "data-merging", "references", "score"))
MERGES = [name for name, spec in REGISTRY.strategies.items() if spec.consumes is ExpertExperience]
LABELS = [label for name in MERGES for label in (name, *(f"{name}@{preset}" for preset in REGISTRY.strategies[name].presets))]
METHODS = [label for label in LABELS if label.partition("@")[0] not in ("zero-shot", "experts", "ensemble")]

Build = Callable[[tuple[int, ...]], nn.Module]


def model(build: Build, tasks: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(build((3, 16, 16)), dict.fromkeys(range(tasks), 4))


def context(build: Build, tasks: int, tmp_path: Path) -> RunContext:
    base = model(build, tasks)
    return RunContext(0, Recipe(), lambda: (base, base.backbone.state_dict()), "", Cache(tmp_path / "cache"), tmp_path)


def experts(context: RunContext, tasks: tuple[int, ...]) -> list[ExpertExperience]:
    """The base after a few steps on random data of each task."""
    made = []
    for index, task in enumerate(tasks):
        base = context.new_model()
        expert = deepcopy(base).train()
        generator = torch.Generator().manual_seed(index)
        x, y = torch.rand(64, 3, 16, 16, generator=generator), torch.randint(0, 4, (64,), generator=generator)
        optimizer = torch.optim.SGD(expert.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(expert(x, task), y).backward()
            optimizer.step()
        data = DataExperience(index, f"expert-{index}", task, ArrayData(x, y))
        made.append(ExpertExperience(index, data.name, task, base, expert.eval(), shared_names(base, tasks), data))
    return made


def merged(label: str, context: RunContext, learned: list[ExpertExperience]) -> Model:
    spec, _, config = REGISTRY.strategy(label)
    strategy = spec.build(config, context)
    for one in learned:
        strategy.learn(one)
    made = strategy.model()
    assert isinstance(made, Model)
    return made


@pytest.mark.parametrize("label", METHODS)
def test_batch_normalization_survives_every_merge(label: str, tmp_path: Path) -> None:
    run = context(SmallResNet, 1, tmp_path)
    learned = experts(run, (0, 0, 0))
    net = merged(label, run, learned)
    states = [one.expert.state_dict() for one in learned]
    seen = 0
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(tensor, torch.stack([state[name] for state in states]).mean(0))
            seen += 1
        if name.endswith("running_var"):
            assert bool((tensor > 0).all())
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == int(learned[0].base.state_dict()[name])
    assert seen > 4
    assert bool(net(torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)), 0).isfinite().all())


@pytest.mark.parametrize("label", METHODS)
def test_private_heads_are_those_of_their_experts(label: str, tmp_path: Path) -> None:
    run = context(SmallViT, 3, tmp_path)
    learned = experts(run, (0, 1))
    state, base = merged(label, run, learned).state_dict(), run.new_model().state_dict()
    for task, one in enumerate(learned):
        assert torch.equal(state[f"heads.{task}.weight"], one.expert.state_dict()[f"heads.{task}.weight"])
    assert torch.equal(state["heads.2.weight"], base["heads.2.weight"])


@pytest.mark.parametrize("label", METHODS)
def test_one_expert_is_itself(label: str, tmp_path: Path) -> None:
    run = context(SmallViT, 2, tmp_path)
    (first, _) = experts(run, (0, 1))
    state = merged(label, run, [first]).state_dict()
    base = run.new_model().state_dict()
    for name, tensor in first.expert.state_dict().items():
        assert torch.equal(state[name], base[name] if name.startswith("heads.1") else tensor)


@pytest.mark.parametrize("label", ["task-arithmetic", "ties", "dare", "score"])
def test_of_one_expert_the_scale_is_applied_too(label: str, tmp_path: Path) -> None:
    run = context(SmallViT, 1, tmp_path)
    (only,) = experts(run, (0,))
    spec, _, config = REGISTRY.strategy(label)
    strategy = spec.build(replace(config, scale=0.25), run)
    strategy.learn(only)
    state, base = strategy.model().state_dict(), run.new_model().state_dict()
    for name in only.shared:
        torch.testing.assert_close(state[name], base[name] + (only.expert.state_dict()[name] - base[name]) / 4)


# MagMax lets the later of equals win, DARE draws by position, SCORE's threshold depends on the order of the concatenated
# directions, and the textbook route of Iso keeps whatever LAPACK puts into the null space.
ORDERED = ("magmax", "dare", "score", "iso-c@released", "iso-cts@released")


@pytest.mark.parametrize("label", [label for label in METHODS if not label.startswith(ORDERED)])
def test_the_order_of_experts_does_not_matter(label: str, tmp_path: Path) -> None:
    run = context(SmallViT, 1, tmp_path)
    learned = experts(run, (0, 0, 0))
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (merged(label, run, order)(x, 0) for order in (learned, learned[::-1]))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


COMPARED = ("score", "tsv", "iso-c", "weight-average")


def backbones_of_suites() -> set[str]:
    """The backbones of the streams on which a committed suite compares spectral merges with the mean."""
    registry = load_registry()
    suites = [one for one in registry.suites.values() if {label.partition("@")[0] for label in one.strategies} >= set(COMPARED)]
    specs = [registry.stream(name) for suite in suites for name in suite.streams]
    return {spec.build(spec.config(), None).base.backbone for spec in specs}


def test_on_the_backbones_of_every_suite_spectral_merges_and_the_mean_are_different_models(tmp_path: Path) -> None:
    names = backbones_of_suites()
    assert names
    for name in names:
        run = context(load_registry(("backbones",)).backbones[name].build, 1, tmp_path)
        learned = experts(run, (0, 0, 0))
        weights = [merged(label, run, learned).state_dict() for label in COMPARED]
        matrices = [key for key, tensor in weights[0].items() if tensor.dim() == 2 and key.startswith("backbone.")]
        differing = [
            key
            for key in matrices
            if all(not torch.allclose(a[key], b[key], rtol=1e-3) for i, a in enumerate(weights) for b in weights[:i])
        ]
        assert len(differing) > len(matrices) / 2


def test_on_a_convolutional_net_spectral_merges_say_that_they_average(tmp_path: Path) -> None:
    run = context(SmallConvNet, 2, tmp_path)
    learned = experts(run, (0, 1))
    spec, _, config = REGISTRY.strategy("tsv")
    strategy = spec.build(config, run)
    assert [strategy.learn(one)["spectral_share"] for one in learned] == [0.0, 0.0]
    mean = merged("weight-average", run, learned).state_dict()
    assert all(torch.allclose(tensor, mean[name]) for name, tensor in strategy.model().state_dict().items())


def nearest_mean(features: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    centres = torch.stack([features[y == label].mean(0) for label in range(4)])
    return torch.cdist(queries, centres).argmin(1)


def test_zero_shot_is_the_base_with_the_nearest_class_mean(tmp_path: Path) -> None:
    run = context(SmallViT, 2, tmp_path)
    (one, _) = experts(run, (1, 0))
    net = merged("zero-shot", run, [one])
    x = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert one.data is not None
    with torch.no_grad():
        base = run.new_model().eval()
        expected = nearest_mean(base.features(one.data.train.x), one.data.train.y, base.features(x))
        assert torch.equal(net(x, 1).argmax(1), expected)


def test_the_ensemble_is_the_mean_of_logits_and_experts_answer_their_own_tasks(tmp_path: Path) -> None:
    run = context(SmallViT, 2, tmp_path)
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    shared = experts(run, (0, 0, 0))
    private = experts(run, (0, 1))
    with torch.no_grad():
        ensemble = REGISTRY.strategies["ensemble"].build(REGISTRY.strategies["ensemble"].config(), run)
        for one in shared:
            ensemble.learn(one)
        logits = torch.stack([one.expert(x, 0) for one in shared]).mean(0)
        torch.testing.assert_close(ensemble.model()(x, 0), logits)
        routed = REGISTRY.strategies["experts"].build(REGISTRY.strategies["experts"].config(), run)
        routed.learn(private[0])
        assert torch.equal(routed.model()(x, 1), run.new_model()(x, 1))
        routed.learn(private[1])
        for task, one in enumerate(private):
            assert torch.equal(routed.model()(x, task), one.expert(x, task))


def test_running_statistics_can_be_recomputed_on_the_experts_data(tmp_path: Path) -> None:
    run = context(SmallResNet, 1, tmp_path)
    learned = experts(run, (0, 0))
    spec, _, config = REGISTRY.strategy("weight-average")
    told = replace(config, recalibrate_bn=True)
    assert [needs_data(spec, one) for one in (config, told)] == [False, True]
    strategy = spec.build(told, run)
    for one in learned:
        strategy.learn(one)
    net = strategy.model()
    with torch.no_grad():
        means = [
            net.backbone.stem(2 * one.data.train.x - 1).mean((0, 2, 3)) for one in learned if one.data is not None
        ]  # 64 pictures are one batch
    torch.testing.assert_close(net.backbone.norm.running_mean, torch.stack(means).mean(0))
    weight = merged("weight-average", run, learned).state_dict()["backbone.stem.weight"]
    assert torch.equal(net.state_dict()["backbone.stem.weight"], weight)


@pytest.mark.parametrize(
    ("label", "experts", "refused"), [("score", 5, True), ("tsv", 5, True), ("score", 4, False), ("iso-c", 5, False)]
)
def test_more_experts_than_singular_vectors_are_refused_where_each_is_to_have_some(
    label: str, experts: int, refused: bool
) -> None:
    spec, _, config = REGISTRY.strategy(label)
    method = spec.build(config, None)  # type: ignore[arg-type]  # files are merged without a context
    shapes = {"bias": (4,), "weight": (4, 64), "other": (64, 3, 1), "large": (64, 64), "text_projection": (2, 64), "w": (1, 9)}
    said = method.refusal({name: shapes[name] for name in ("bias", "weight", "large", "text_projection")}, experts)  # type: ignore[attr-defined]
    assert bool(said) is refused
    if refused:
        assert said.startswith("expected at most 4 experts for 'weight' of shape (4, 64), got 5: ")
        assert said.endswith("with --set exclude=text_projection,weight")  # what is excluded already stays so
        both = method.refusal(shapes, experts)  # type: ignore[attr-defined]
        assert "for 'weight' of shape (4, 64) and 1 more, got 5" in both
        assert both.endswith("with --set exclude=text_projection,weight,w")
