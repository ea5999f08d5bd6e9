"""What a strategy may see of a stream, and what it cannot learn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftproof.benchmark import (
    BaseRecipe,
    Batch,
    DataExperience,
    ExpertExperience,
    GroupedExperience,
    JointExperience,
    Model,
    RunContext,
    Stream,
    TransportExperience,
    leave_one_domain_out,
)
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import StrategySpec
from shiftproof.benchmark.errors import ContractError
from shiftproof.benchmark.lifting import (
    carried_to,
    expert_for,
    is_lifted,
    lift,
    obstacle,
    shared_names,
    visible_expert,
)
from shiftproof.benchmark.registry.lookup import Registry


@pytest.fixture
def stream(registry: Registry) -> Stream:
    spec = registry.stream("tiny")
    return spec.build(spec.config(), None)


def tiny_model() -> Model:
    backbone = torch.nn.Identity()
    backbone.features = 2  # type: ignore[assignment]
    return Model(backbone, {0: 2})


def seen(registry: Registry, strategy: str, stream: Stream) -> tuple[Any, ...]:
    return lift(registry.strategies[strategy], stream.folds[0])


@pytest.mark.parametrize("way", [lambda one: one, copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_groups_are_stripped_unless_they_are_declared(registry: Registry, stream: Stream, way: Callable[[Any], Any]) -> None:
    for experience in map(way, seen(registry, "toy", stream)):
        assert type(experience) is DataExperience
        assert "groups" not in vars(experience)
        with pytest.raises(ContractError, match="reads group labels without declaring it: set uses_group_labels=True"):
            _ = experience.groups  # type: ignore[attr-defined]


def test_a_batch_says_where_the_groups_are() -> None:
    batch = Batch(*[torch.zeros(1)] * 4)
    with pytest.raises(AttributeError, match=r"'Batch' object has no attribute 'groups'; groups are experience\.groups\[batch"):
        _ = batch.groups  # type: ignore[attr-defined]


def test_nothing_that_an_experience_holds_leads_to_the_groups(registry: Registry, stream: Stream) -> None:
    for experience, original in zip(seen(registry, "toy", stream), stream.folds[0].train, strict=True):
        assert isinstance(original, GroupedExperience)
        tensors = [value for part in (experience, experience.train) for value in vars(part).values() if torch.is_tensor(value)]
        assert len(tensors) == 2
        assert all(tensor.shape != original.groups.shape or not torch.equal(tensor, original.groups) for tensor in tensors)


def test_who_declares_group_labels_gets_them(registry: Registry, stream: Stream) -> None:
    experiences = seen(registry, "grouped", stream)
    assert experiences == stream.folds[0].train
    assert all(len(one.groups) == len(one.train) for one in experiences)


def test_any_other_attribute_that_is_missing_is_an_ordinary_error(stream: Stream) -> None:
    with pytest.raises(AttributeError, match="'GroupedExperience' object has no attribute 'group'"):
        _ = stream.folds[0].train[0].group  # type: ignore[union-attr]


def test_joint_gets_the_union_in_order_with_the_task_of_each_sample_and_no_groups(registry: Registry, stream: Stream) -> None:
    (union,) = seen(registry, "union", stream)
    assert type(union) is JointExperience
    parts = [one for one in stream.folds[0].train if isinstance(one, DataExperience)]
    assert torch.equal(union.train.x, torch.cat([part.train.x for part in parts]))
    assert torch.equal(union.train.y, torch.cat([part.train.y for part in parts]))
    assert union.tasks(torch.tensor([0, len(parts[0].train), len(parts[0].train) - 1])).tolist() == [0, 1, 0]
    with pytest.raises(ContractError):
        _ = union.groups  # type: ignore[attr-defined]


def test_obstacles_say_why(registry: Registry, stream: Stream) -> None:
    plain = registry.stream("tiny-plain").build(registry.stream("tiny-plain").config(), None)
    toy, grouped, union = (registry.strategies[name] for name in ("toy", "grouped", "union"))
    assert [obstacle(spec, stream) for spec in (toy, grouped, union)] == ["", "", ""]
    assert obstacle(grouped, plain) == "needs group labels, the stream has none"
    assert obstacle(registry.strategies["missing"], stream) == "needs shiftproof[clip]"
    assert obstacle(replace(toy, consumes=ExpertExperience), stream) == ""  # data are lifted to experts
    transport = replace(toy, consumes=TransportExperience)
    assert obstacle(transport, stream) == "carries a fine-tuning to a new release, the stream has none"
    told = replace(union, uses_group_labels=True)
    assert obstacle(told, stream) == "needs group labels, the union of a stream's experiences has none"


def test_a_stream_of_experts_is_not_data(registry: Registry, stream: Stream) -> None:
    net = tiny_model()
    expert = ExpertExperience(0, "expert", 0, net, net, frozenset())
    experts = replace(stream, folds=(replace(stream.folds[0], train=(expert,)),))
    assert obstacle(registry.strategies["toy"], experts) == "learns from data, the stream has none"
    assert obstacle(replace(registry.strategies["toy"], consumes=ExpertExperience), experts) == ""


def test_merges_see_data_only_if_they_need_it_and_groups_only_if_they_use_them(registry: Registry, stream: Stream) -> None:
    net = tiny_model()
    expert = ExpertExperience(0, "expert", 0, net, net, frozenset(), stream.folds[0].train[0])  # type: ignore[arg-type]
    fold = replace(stream.folds[0], train=(expert,))

    def data(**facts: bool) -> type:
        (one,) = lift(replace(registry.strategies["toy"], consumes=ExpertExperience, **facts), fold)  # type: ignore[arg-type]
        assert isinstance(one, ExpertExperience)
        return type(one.data)

    assert [data(), data(needs_data=True), data(needs_data=True, uses_group_labels=True)] == [
        type(None),
        DataExperience,
        GroupedExperience,
    ]


@pytest.fixture
def context(stream: Stream, tmp_path: Path) -> RunContext:
    def base() -> tuple[Model, dict[str, torch.Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Model(SmallConvNet(stream.input_shape), stream.heads)
        return model, dict(model.backbone.state_dict())

    return RunContext(3, replace(stream.recipe, epochs=2), base, "", Cache(tmp_path / "cache"), tmp_path)


@pytest.fixture
def trainer(registry: Registry) -> StrategySpec[Any]:
    return registry.strategies["sgd"]


def data_of(stream: Stream) -> list[DataExperience]:
    return [one.without_groups() for one in stream.folds[0].train if isinstance(one, GroupedExperience)]


def test_an_expert_is_the_base_fine_tuned_on_one_experience_alone(
    stream: Stream, context: RunContext, trainer: StrategySpec[Any]
) -> None:
    second = data_of(stream)[1]
    expert = expert_for(second, stream.folds[0], stream, trainer, "code", context)
    strategy = trainer.build(trainer.config(), context.child("expert/task-1"))
    with context.child("expert/task-1").global_rng("expert"):
        strategy.learn(replace(second, index=0))
    alone = strategy.model().state_dict()
    assert all(torch.equal(alone[name], tensor) for name, tensor in expert.expert.state_dict().items())
    base = context.new_model().state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in expert.base.state_dict().items())
    assert not torch.equal(base["heads.1.weight"], alone["heads.1.weight"])
    assert torch.equal(base["heads.0.weight"], alone["heads.0.weight"])
    assert (expert.shared & expert.private, expert.private) == (frozenset(), {"heads.1.weight", "heads.1.bias"})


def test_leave_one_out_over_d_domains_trains_d_experts_whatever_the_number_of_methods(
    stream: Stream, context: RunContext, trainer: StrategySpec[Any]
) -> None:
    domains = [replace(data_of(stream)[i % 2], name=f"domain-{i}", task=0) for i in range(3)]
    evals = [replace(stream.folds[0].evals[0], name=one.name) for one in domains]
    folds = leave_one_domain_out(domains, evals)
    lodo = replace(stream, folds=folds, heads={0: 2})
    weights: dict[str, list[torch.Tensor]] = {}
    for _ in ("score", "tsv"):
        for fold in folds:
            for one in fold.train:
                assert isinstance(one, DataExperience)
                expert = expert_for(one, fold, lodo, trainer, "code", context).expert
                weights.setdefault(one.name, []).append(expert.state_dict()["heads.0.weight"])
    assert context.cache.made["expert"] == context.cost.experts_trained == 3
    assert context.cost.experts_reused == 2 * 3 * 2 - 3
    assert all(torch.equal(first, other) for first, *others in weights.values() for other in others)
    assert not torch.equal(weights["domain-0"][0], weights["domain-2"][0])  # the same data under another name


@pytest.mark.parametrize("change", ["seed", "recipe", "data", "code"])
def test_whatever_an_expert_depends_on_gives_another(
    change: str, stream: Stream, context: RunContext, trainer: StrategySpec[Any]
) -> None:
    first, second = data_of(stream)
    expert_for(first, stream.folds[0], stream, trainer, "code", context)
    if change == "seed":
        context = context.child("another")
    if change == "data":
        first = replace(first, train=second.train)
    changed = replace(stream, recipe=replace(stream.recipe, lr=0.01)) if change == "recipe" else stream
    expert_for(first, stream.folds[0], changed, trainer, "other" if change == "code" else "code", context)
    assert context.cache.made["expert"] == 2


def test_a_head_that_all_experiences_share_is_merged_and_others_are_private(stream: Stream) -> None:
    model = Model(SmallConvNet((3, 8, 8)), {0: 2, 1: 2})
    backbone = {name for name in model.state_dict() if name.startswith("backbone.")}
    assert shared_names(model, [0, 1]) == backbone
    assert shared_names(model, [0, 0]) == backbone | {"heads.0.weight", "heads.0.bias"}
    assert shared_names(model, [0]) == backbone


def test_only_who_declares_it_learns_the_held_out_domain(registry: Registry, stream: Stream) -> None:
    domains = [replace(one, task=0) for one in data_of(stream)]
    fold, _ = leave_one_domain_out(domains, [replace(stream.folds[0].evals[0], name=one.name) for one in domains])
    toy = replace(registry.strategies["toy"], consumes=ExpertExperience)
    assert [one.name for one in lift(toy, fold)] == ["task-1"]
    assert [one.name for one in lift(replace(toy, uses_target=True), fold)] == ["task-0"]


def test_a_union_of_tasks_gives_no_experts(registry: Registry, stream: Stream) -> None:
    (fold,) = stream.folds
    union = replace(stream, folds=(replace(fold, train=(fold.joint(),)),))
    merge = replace(registry.strategies["toy"], consumes=ExpertExperience)
    assert (is_lifted(merge, union), is_lifted(merge, stream)) == (False, True)
    assert obstacle(merge, union) == "consumes ExpertExperience, the stream yields JointExperience"
    assert obstacle(registry.strategies["union"], union) == ""


RELEASE = BaseRecipe("digits-cnn", kind="random", seed=1)


def test_only_transport_meets_a_stream_with_a_release_and_no_other(registry: Registry, stream: Stream) -> None:
    released = replace(stream, release=RELEASE)
    toy, union, grouped = (registry.strategies[name] for name in ("toy", "union", "grouped"))
    merge, transport = replace(toy, consumes=ExpertExperience), replace(toy, consumes=TransportExperience)
    why = "the stream carries a fine-tuning to a new release"
    assert [obstacle(spec, released) for spec in (toy, union, grouped, merge)] == [why] * 4
    assert (obstacle(transport, released), is_lifted(transport, released), is_lifted(merge, released)) == ("", True, False)
    assert (is_lifted(transport, stream), is_lifted(merge, stream)) == (False, True)
    assert obstacle(replace(transport, unavailable="needs shiftproof[clip]"), released) == "needs shiftproof[clip]"


@pytest.mark.parametrize(
    ("kind", "task", "own"),
    [("supervised", 1, {1}), ("class-embeddings", 0, set()), ("supervised", 0, set()), ("random", 0, {0}), ("random", 1, {1})],
)
def test_what_a_fine_tuning_carries_is_the_backbone_and_a_head_that_the_base_brings(
    kind: Any, task: int, own: set[int], stream: Stream, context: RunContext, trainer: StrategySpec[Any]
) -> None:
    named = replace(stream, base=replace(stream.base, kind=kind), release=RELEASE)
    expert = expert_for(data_of(stream)[task], stream.folds[0], named, trainer, "code", context)
    target = context.child("another").new_model()
    carried = carried_to(target, expert)
    assert type(carried) is TransportExperience
    assert (carried.target_base, carried.base, carried.expert) == (target, expert.base, expert.expert)
    assert (carried.name, carried.task, carried.data) == (f"task-{task}", task, expert.data)
    assert carried.private == {f"heads.{one}.{part}" for one in own for part in ("weight", "bias")}
    backbone = {name for name in target.state_dict() if name.startswith("backbone.")}
    brought = {"heads.0.weight", "heads.0.bias"} if kind != "random" else set()
    assert carried.shared == backbone | brought


def test_a_transport_sees_data_only_if_it_declares_it(
    registry: Registry, stream: Stream, context: RunContext, trainer: StrategySpec[Any]
) -> None:
    named = replace(stream, release=RELEASE)
    expert = expert_for(data_of(stream)[0], stream.folds[0], named, trainer, "code", context)
    carried = carried_to(context.new_model(), expert)
    spec = replace(registry.strategies["toy"], consumes=TransportExperience)
    blind = visible_expert(spec, spec.config(), carried)
    assert isinstance(blind, TransportExperience)
    assert blind.data is None
    assert blind.target_base is carried.target_base
    assert visible_expert(replace(spec, needs_data=True), spec.config(), carried) is carried


def test_transports_merges_and_folds_share_one_expert(stream: Stream, context: RunContext, trainer: StrategySpec[Any]) -> None:
    named = replace(stream, release=RELEASE)
    first = data_of(stream)[0]
    experts = [expert_for(first, stream.folds[0], one, trainer, "code", context) for one in (stream, named, named)]
    assert context.cache.made["expert"] == context.cost.experts_trained == 1
    assert context.cost.experts_reused == 2
    weights = [one.expert.state_dict()["heads.0.weight"] for one in experts]
    assert torch.equal(weights[0], weights[2])


def test_a_release_of_another_architecture_is_refused(stream: Stream) -> None:
    with pytest.raises(ValueError, match="expected one backbone for base and release, got digits-cnn and digits-vit"):
        replace(stream, release=replace(RELEASE, backbone="digits-vit"))


def test_the_release_has_a_hash_of_its_own_and_leaves_that_of_the_base(stream: Stream) -> None:
    first, second = data_of(stream)
    learned = BaseRecipe("digits-cnn", kind="supervised")
    plain = replace(stream, base=learned, base_data=first.train)
    hashes = [
        replace(plain, release=replace(learned, seed=seed), release_data=data)
        for seed, data in ((1, second.train), (2, second.train), (1, first.train))
    ]
    assert plain.release_sha256 == ""
    assert len({one.release_sha256 for one in hashes} | {plain.base_sha256}) == 4
    assert {one.base_sha256 for one in hashes} == {plain.base_sha256}
    assert replace(plain, release=learned, release_data=first.train).release_sha256 == plain.base_sha256
    assert [x.shape for x in hashes[0].unlabelled_release()] == [second.train.x.shape]
    assert len(replace(plain, release=learned).unlabelled_release()) == 2  # without data of its own, all experiences
