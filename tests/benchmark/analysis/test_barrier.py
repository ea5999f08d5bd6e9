"""Loss barriers. Oracles: closed forms of a quadratic and of a network that is the same with both signs; convexity."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, strategies as st

from shiftproof.benchmark import EvalSet, ExpertExperience
from shiftproof.benchmark.analysis.barrier import barrier, barrier_height, chord
from shiftproof.benchmark.analysis.plane import Plane
from shiftproof.benchmark.errors import InputError

Product = Callable[[str, float, float], ExpertExperience]
NUMBER = st.floats(-10, 10)


@given(curve=NUMBER, slope=NUMBER, constant=NUMBER)
def test_a_quadratic_has_the_barrier_of_its_closed_form(curve: float, slope: float, constant: float) -> None:
    """c t^2 + s t + b lies c t (t - 1) above the line between its ends: -c / 4 at the middle where c < 0, else nowhere."""
    losses = [curve * t * t / 100 + slope * t / 10 + constant for t in range(11)]
    assert barrier_height(losses) == pytest.approx(max(0.0, -curve / 4), abs=1e-12)


@given(losses=st.lists(NUMBER, min_size=3, max_size=20), slope=NUMBER, constant=NUMBER)
def test_a_line_added_or_the_other_direction_does_not_change_a_barrier(
    losses: list[float], slope: float, constant: float
) -> None:
    tilted = [loss + slope * place + constant for place, loss in enumerate(losses)]
    assert barrier_height(tilted) == pytest.approx(barrier_height(losses), abs=1e-9)
    assert barrier_height(losses[::-1]) == pytest.approx(barrier_height(losses), abs=1e-12)


def test_the_chord_ends_where_the_losses_do() -> None:
    assert chord([1.0, 9.0, 9.0, 4.0]) == [1.0, 2.0, 3.0, 4.0]
    assert math.isnan(barrier_height([1.0, math.nan, 2.0]))


def test_between_weights_of_both_signs_the_function_vanishes(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    """(w, w) and (-w, -w) are one function; half way the logits are 0, the loss log 2."""
    plane = Plane(product_expert("a", 2.0, 2.0), product_expert("b", -2.0, -2.0))
    found = barrier(plane, evals[:1])
    assert found.points == pytest.approx([place / 10 for place in range(11)])
    assert found.losses[0] == pytest.approx(math.log1p(math.exp(-8)), rel=1e-5)
    assert found.losses[-1] == found.losses[0]
    assert found.height == pytest.approx(math.log(2) - math.log1p(math.exp(-8)), rel=1e-6)


def test_the_ends_are_the_experts_in_their_order(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    plane = Plane(product_expert("a", 1.0, 1.0), product_expert("b", 1.0, -1.0))
    found = barrier(plane, evals, points=3)
    assert [one.accuracies[0] for one in (found.line[0], found.line[-1])] == [1.0, 0.0]
    assert found.experts == ("a", "b")
    assert found.eval_sets == ("clean", "noisy")


def test_where_the_loss_is_convex_there_is_no_barrier(product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    """One weight moves, the other is 1 at both ends: cross-entropy is convex in the logits, and they are linear."""
    found = barrier(Plane(product_expert("a", -1.0, 1.0), product_expert("b", 3.0, 1.0)), evals, points=21)
    assert found.height == 0
    assert found.heights == (0, 0)
    assert min(found.losses) < min(found.losses[0], found.losses[-1])


@pytest.mark.parametrize("points", [-1, 0, 2, 1002])
def test_a_line_needs_an_inside(points: int, product_expert: Product, evals: tuple[EvalSet, ...]) -> None:
    plane = Plane(product_expert("a", 1.0, 1.0), product_expert("b", 2.0, 1.0))
    with pytest.raises(InputError, match=f"expected --points from 3 to 1001, got {points}"):
        barrier(plane, evals, points)
