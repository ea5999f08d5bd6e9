"""What a strategy may see of a stream, and what it cannot learn."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from shiftproof.benchmark import DataExperience, ExpertExperience, GroupedExperience, JointExperience, Stream
from shiftproof.benchmark.errors import ContractError
from shiftproof.benchmark.lifting import lift, obstacle
from shiftproof.benchmark.registry.lookup import Registry


@pytest.fixture
def stream(registry: Registry) -> Stream:
    spec = registry.stream("tiny")
    return spec.build(spec.config(), None)


def seen(registry: Registry, strategy: str, stream: Stream) -> tuple[Any, ...]:
    return lift(registry.strategies[strategy], stream.folds[0])


@pytest.mark.parametrize("way", [lambda one: one, copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_groups_are_stripped_unless_they_are_declared(registry: Registry, stream: Stream, way: Callable[[Any], Any]) -> None:
    for experience in map(way, seen(registry, "toy", stream)):
        assert type(experience) is DataExperience
        assert "groups" not in vars(experience)
        with pytest.raises(ContractError, match="reads group labels without declaring it: set uses_group_labels=True"):
            _ = experience.groups  # type: ignore[attr-defined]


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
    merging = replace(toy, consumes=ExpertExperience)
    assert obstacle(merging, stream) == "consumes ExpertExperience, the stream yields GroupedExperience"
    told = replace(union, uses_group_labels=True)
    assert obstacle(told, stream) == "needs group labels, the union of a stream's experiences has none"


def test_a_stream_of_experts_is_not_data(registry: Registry, stream: Stream) -> None:
    net = torch.nn.Linear(1, 1)
    expert = ExpertExperience(0, "expert", 0, net, net, frozenset())
    experts = replace(stream, folds=(replace(stream.folds[0], train=(expert,)),))
    assert obstacle(registry.strategies["toy"], experts) == "learns from data, the stream has none"
    assert obstacle(replace(registry.strategies["toy"], consumes=ExpertExperience), experts) == ""


def test_merges_see_data_only_if_they_need_it_and_groups_only_if_they_use_them(registry: Registry, stream: Stream) -> None:
    net = torch.nn.Linear(1, 1)
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
