"""Randomness by purpose and position, the base model, and when checkpoints are written."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shiftproof.benchmark import Model, Recipe, RunContext
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import Checkpointer, derive_seed


class Net(nn.Module):
    features = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)


def base() -> tuple[Model, dict[str, torch.Tensor]]:
    weights = {"linear.weight": torch.arange(12.0).view(3, 4), "linear.bias": torch.ones(3)}
    return Model(Net(), {0: 2, 1: 2}), weights


def context(seed: int = 0) -> RunContext:
    return RunContext(seed, Recipe(), base, "", Cache(), Path())


def draw(generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=generator).tolist()


def test_a_generator_depends_on_purpose_and_position_and_on_nothing_else() -> None:
    first, second = context(), context()
    wanted = draw(first.generator("replay", 1, 2))
    for purpose in ("init", "order", "replay"):  # other purposes, positions and global draws come before
        second.generator(purpose, 0)
    torch.rand(7)
    assert draw(second.generator("replay", 1, 2)) == wanted


@pytest.mark.parametrize(
    ("purpose", "position", "seed"), [("replay", (1, 3), 0), ("replay", (12,), 0), ("order", (1, 2), 0), ("replay", (1, 2), 1)]
)
def test_another_purpose_position_or_seed_gives_another_generator(purpose: str, position: tuple[int, ...], seed: int) -> None:
    assert draw(context(seed).generator(purpose, *position)) != draw(context().generator("replay", 1, 2))


def test_derived_seeds_are_the_same_in_every_process() -> None:
    # Each session of the tests is a process of its own, so it is compared with `printf 3/replay/a/2 | b2sum -l 64`.
    digest = bytes.fromhex("3564c89212ba0b1d")
    assert derive_seed(3, "replay", "a", 2) == int.from_bytes(digest, "little") >> 1


def test_derived_seeds_do_not_collide_and_fit_every_generator() -> None:
    seeds = [derive_seed(seed, "p", i) for seed in range(20) for i in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def global_draws() -> tuple[list[float], list[float], float]:
    return torch.rand(5).tolist(), np.random.rand(5).tolist(), random.random()


def states() -> tuple[list[int], Any, Any]:
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def test_global_rng_repeats_itself_and_restores_all_three_generators() -> None:
    torch.rand(3), np.random.randn(1), random.random()  # numpy now holds a cached normal draw
    before = states()
    with context().global_rng("avalanche", 1):
        inside = global_draws()
    assert states() == before
    global_draws()
    with context().global_rng("avalanche", 1):
        assert global_draws() == inside
    with context().global_rng("avalanche", 2):
        assert global_draws() != inside


def test_global_rng_restores_the_generators_when_an_exception_passes() -> None:
    before = states()

    def interrupted() -> None:
        with context().global_rng("a"):
            global_draws()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert states() == before


def test_fences_nest() -> None:
    with context().global_rng("outer"):
        wanted = global_draws(), global_draws()
    with context().global_rng("outer"):
        first = global_draws()
        with context().global_rng("inner"):
            global_draws()
        assert (first, global_draws()) == wanted


def test_every_new_model_of_a_run_has_the_same_weights_and_none_shares_memory() -> None:
    run = context()
    one, other = run.new_model(), run.new_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        one.head(0).weight.zero_()
    assert bool(other.head(0).weight.any())
    assert bool(run.new_model().head(0).weight.any())


def test_heads_depend_on_the_seed_of_the_run_and_the_backbone_does_not() -> None:
    one, again, other = (context(seed).new_model().state_dict() for seed in (0, 0, 1))
    for model in (one, again, other):
        assert torch.equal(model["backbone.linear.weight"], base()[1]["linear.weight"])
    assert torch.equal(again["heads.0.weight"], one["heads.0.weight"])
    assert not torch.equal(other["heads.0.weight"], one["heads.0.weight"])


def test_making_the_base_leaves_the_global_generators_alone() -> None:
    before = states()
    context().new_model()
    assert states() == before


def test_a_copy_of_what_holds_the_context_holds_the_same_context() -> None:
    run = context()
    assert copy.deepcopy([run])[0] is run


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("shiftproof.benchmark.context.time.monotonic", lambda: self.now)


def ticks(clock: Clock, checkpointer: Checkpointer, seconds: float, each: float) -> None:
    for _ in range(round(seconds / each)):
        clock.now += each
        checkpointer.tick(dict)


@pytest.mark.parametrize(("cost", "expected"), [(0.1, 20), (3.0, 4), (60.0, 1)])
def test_checkpoints_come_at_most_every_30_seconds_and_take_at_most_2_percent(
    monkeypatch: pytest.MonkeyPatch, cost: float, expected: int
) -> None:
    clock, written = Clock(monkeypatch), []

    def write(state: object) -> None:
        clock.now += cost
        written.append(clock.now)

    checkpointer = Checkpointer(write)
    ticks(clock, checkpointer, 600 + cost, 0.5)
    assert len(written) == pytest.approx(expected, abs=1)
    gaps = np.diff(written)
    assert (gaps >= 30).all()
    assert (cost / gaps <= 0.0201).all()


def test_what_cannot_be_saved_is_an_error_at_the_first_tick_long_before_the_first_checkpoint() -> None:
    def state() -> dict[str, Any]:
        raise TypeError("attribute 'lock'")

    with pytest.raises(TypeError, match="lock"):
        Checkpointer(lambda _: None, seconds=3600).tick(state)


def test_an_interval_of_zero_writes_at_every_tick() -> None:
    written: list[object] = []
    checkpointer = Checkpointer(written.append, seconds=0)
    count: Callable[[], dict[str, int]] = lambda: {"n": len(written)}  # noqa: E731
    for _ in range(4):
        checkpointer.tick(count)
    assert written == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]
