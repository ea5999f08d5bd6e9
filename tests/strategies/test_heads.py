"""Heads that are born during training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from shiftproof.benchmark import Model, Recipe, RunContext
from shiftproof.benchmark.cache import Cache
from shiftproof.strategies import Heads


def nobody() -> tuple[Model, dict[str, torch.Tensor]]:
    raise AssertionError("heads need no model")


def context(seed: int = 0) -> RunContext:
    return RunContext(seed, Recipe(), nobody, "", Cache(Path("unused")), Path())


def born(*names: str, seed: int = 0, purpose: str = "heads") -> Heads:
    heads = Heads(context(seed), purpose)
    for name in names:
        heads.add(name, 4, 2)
    return heads


def weight(heads: Heads, name: str) -> list[float]:
    drawn: torch.Tensor = heads.state_dict()[f"heads.{name}.weight"]
    return drawn.flatten().tolist()


def test_a_head_is_drawn_by_its_name_whatever_was_born_or_drawn_before() -> None:
    wanted = weight(born("a"), "a")
    torch.rand(9)
    assert weight(born("c", "b", "a"), "a") == wanted
    others = (born("b"), "b"), (born("a", seed=1), "a"), (born("a", purpose="other"), "a")
    assert all(weight(*other) != wanted for other in others)


def test_adding_a_head_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    born("a")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="expected a new name, got 'a', which exists; heads: a, b"):
        born("a", "b").add("a", 4, 2)
    assert "a" in born("a")
    assert "b" not in born("a")


def test_answers_are_linear_in_the_features() -> None:
    heads = born("a", "b")
    x = torch.rand(5, 4)
    state = heads.state_dict()
    torch.testing.assert_close(heads(x, "b"), x @ state["heads.b.weight"].T + state["heads.b.bias"])
    assert torch.equal(heads.every(x), torch.cat([heads(x, "a"), heads(x, "b")], dim=1))


def test_rebuilding_makes_removes_and_resizes_heads_as_the_checkpoint_has_them() -> None:
    source = Heads(context())
    for name, classes in (("z", 3), ("a", 2), ("m", 5)):
        source.add(name, 4, classes)
    target = born("a", "m", "gone")
    kept = target.heads["a"]
    target.rebuild(source.sizes(), source.state_dict())
    assert list(target.sizes().items()) == [("z", [3, 4]), ("a", [2, 4]), ("m", [5, 4])]
    assert target.heads["a"] is kept  # an optimizer may hold its parameters
    assert [tensor.tolist() for tensor in target.parameters()] == [tensor.tolist() for tensor in source.parameters()]


def test_a_copy_shares_the_context_and_nothing_else() -> None:
    heads = born("a")
    twin = copy.deepcopy(heads)
    assert twin._context is heads._context
    with torch.no_grad():
        twin.heads["a"].weight.zero_()  # type: ignore[operator]
    assert any(weight(heads, "a"))
