"""The plane through a base and two experts. Oracles: its corners, and means of statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from shiftproof.benchmark import EvalSet, ExpertExperience
from shiftproof.benchmark.analysis.plane import Plane, base_as_expert
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.driver import merge_states

MakeExpert = Callable[[str, int, int], ExpertExperience]


@pytest.fixture
def pair(batch_norm_expert: MakeExpert) -> tuple[ExpertExperience, ExpertExperience]:
    return batch_norm_expert("a", 1, 0), batch_norm_expert("b", 2, 1)


def test_the_corners_are_base_and_experts_but_for_counters_and_heads_of_others(
    pair: tuple[ExpertExperience, ExpertExperience],
) -> None:
    first, second = pair
    plane = Plane(first, second)
    for point, model in (((1, 0), first.expert), ((0, 1), second.expert), ((0, 0), first.base)):
        state, expected = plane.model_at(*point).state_dict(), model.state_dict()
        moved = [name for name in first.shared if expected[name].is_floating_point()]
        assert len(moved) == 6
        assert all(torch.equal(state[name], expected[name]) for name in moved)


def test_private_heads_stay_with_their_experts_and_counters_with_the_base(
    pair: tuple[ExpertExperience, ExpertExperience],
) -> None:
    first, second = pair
    state = Plane(first, second).model_at(0.3, 1.7).state_dict()
    assert torch.equal(state["heads.0.weight"], first.expert.state_dict()["heads.0.weight"])
    assert torch.equal(state["heads.1.bias"], second.expert.state_dict()["heads.1.bias"])
    assert int(state["backbone.1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("point", [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0)])
def test_statistics_at_equal_coefficients_are_the_mean_as_in_every_merge(
    pair: tuple[ExpertExperience, ExpertExperience], point: tuple[float, float], summing: Callable[[], object]
) -> None:
    first, second = pair
    base, *experts = (model.state_dict() for model in (first.base, first.expert, second.expert))
    merged, _ = merge_states(summing(), base, experts, first.shared.__contains__)  # type: ignore[arg-type]
    state = Plane(first, second).model_at(*point).state_dict()
    for name in ("backbone.1.running_mean", "backbone.1.running_var"):
        torch.testing.assert_close(state[name], merged[name])
    if point == (1.0, 1.0):
        torch.testing.assert_close(state["backbone.0.weight"], merged["backbone.0.weight"])


@pytest.mark.parametrize("point", [(2.0, -1.0), (-2.0, 0.5), (0.0, -1.0)])
def test_variances_stay_positive_wherever_one_looks(
    pair: tuple[ExpertExperience, ExpertExperience], point: tuple[float, float]
) -> None:
    assert float(Plane(*pair).model_at(*point).state_dict()["backbone.1.running_var"].min()) > 0


def test_a_model_of_the_plane_is_a_copy(pair: tuple[ExpertExperience, ExpertExperience]) -> None:
    before = {name: tensor.clone() for name, tensor in pair[0].base.state_dict().items()}
    Plane(*pair).model_at(1, 1)
    assert all(torch.equal(before[name], tensor) for name, tensor in pair[0].base.state_dict().items())


def test_between_base_and_expert_the_head_of_the_task_moves_too(pair: tuple[ExpertExperience, ExpertExperience]) -> None:
    expert = pair[1]
    middle = Plane(base_as_expert(expert), expert).model_at(0.5, 0.5).state_dict()["heads.1.weight"]
    ends = [model.state_dict()["heads.1.weight"] for model in (expert.base, expert.expert)]
    torch.testing.assert_close(middle, (ends[0] + ends[1]) / 2)


def test_only_tasks_with_a_learned_head_are_answered(
    pair: tuple[ExpertExperience, ExpertExperience], evals: tuple[EvalSet, ...]
) -> None:
    own, other = (replace(evals[0], name=f"task-{task}", parts=((task, evals[0].parts[0][1]),)) for task in (0, 1))
    assert Plane(*pair).answerable((own, other)) == (own, other)
    alone = Plane(base_as_expert(pair[0]), pair[0])
    assert alone.answerable((own, other)) == (own,)
    with pytest.raises(InputError, match="expected an eval set with a task of base or a, got task-1; choose others"):
        alone.answerable((other,))


def test_equal_models_are_refused(pair: tuple[ExpertExperience, ExpertExperience]) -> None:
    with pytest.raises(InputError, match="expected two different models, got 'a' and 'c' with equal weights"):
        Plane(pair[0], replace(pair[0], name="c"))
