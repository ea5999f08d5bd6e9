"""The recipe's optimizer and learning rate are PyTorch's, bit for bit, in one vector or many tensors."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark import Recipe
from shiftproof.strategies.optimizers import FlatSGD, clip_and_step, learning_rate, make_optimizer

RECIPE = Recipe(lr=0.1, momentum=0.9)
SHAPES = [(8, 3, 3, 3), (8,), (5, 16), (5,), (2, 7), ()]

RECIPES = {
    "momentum": RECIPE,
    "plain": replace(RECIPE, momentum=0.0),
    "clipped": replace(RECIPE, clip_norm=0.5),
    "clipped-plain": replace(RECIPE, momentum=0.0, clip_norm=0.5),
    "decayed": replace(RECIPE, clip_norm=0.5, weight_decay=0.01),
    "below-the-bound": replace(RECIPE, clip_norm=1e6),
    "adam": replace(RECIPE, optimizer="adam", clip_norm=0.5, weight_decay=0.01),
    "adamw": replace(RECIPE, optimizer="adamw", clip_norm=0.5, weight_decay=0.01),
}


def parameters(dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[nn.Parameter]:
    """Of several shapes, always the same."""
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[at % len(dtypes)])) for at, shape in enumerate(SHAPES)
    ]


def pytorch(recipe: Recipe, given: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As its documentation has it, a loop over tensors."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(given, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, foreach=False)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(given, recipe.lr, weight_decay=recipe.weight_decay, foreach=False)


def give_gradients(given: list[nn.Parameter], step: int, absent: Sequence[int]) -> None:
    """Those of a step; some parameters have none."""
    generator = torch.Generator().manual_seed(100 + step)
    for at, one in enumerate(given):
        gradient = torch.randn(one.shape, generator=generator).to(one.dtype)
        one.grad = None if at in absent else gradient


def run_both(
    recipe: Recipe, absent: Callable[[int], Sequence[int]], dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> tuple[list[Tensor], list[Tensor]]:
    """Ten steps of ours and of PyTorch's, with another learning rate in each."""
    ours, theirs = parameters(dtypes), parameters(dtypes)
    mine, bare = make_optimizer(recipe, ours), pytorch(recipe, theirs)
    for step in range(10):
        for given, optimizer in ((ours, mine), (theirs, bare)):
            give_gradients(given, step, absent(step))
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, 12)
        clip_and_step(mine, recipe.clip_norm)
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(theirs, recipe.clip_norm, foreach=False)
        bare.step()
    return [one.detach() for one in ours], [one.detach() for one in theirs]


ABSENT: dict[str, Callable[[int], Sequence[int]]] = {
    "all have gradients": lambda step: (),
    "some never have": lambda step: (2, 3),
    "some have at times": lambda step: (step % 3, 5) if step % 2 else (),
    "at times none has": lambda step: range(len(SHAPES)) if step == 4 else (),
}


@pytest.mark.parametrize("absent", list(ABSENT))
@pytest.mark.parametrize("kind", list(RECIPES))
def test_steps_are_those_of_pytorch_bit_for_bit(kind: str, absent: str) -> None:
    ours, theirs = run_both(RECIPES[kind], ABSENT[absent])
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], parameters()[0])


def test_parameters_of_two_dtypes_are_stepped_as_by_pytorch() -> None:
    two = (torch.float32, torch.float64)
    assert not isinstance(make_optimizer(RECIPE, parameters(two)), FlatSGD)
    ours, theirs = run_both(replace(RECIPE, clip_norm=0.5), ABSENT["some never have"], two)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("taken", ["loaded", "copied"])
def test_a_checkpoint_in_the_middle_changes_nothing(taken: str) -> None:
    given = parameters()
    optimizer = make_optimizer(RECIPE, given)
    resumed: list[tuple[list[nn.Parameter], torch.optim.Optimizer]] = []
    for step in range(6):
        if step == 3 and taken == "loaded":
            written = io.BytesIO()
            torch.save(optimizer.state_dict(), written)
            written.seek(0)
            others = copy.deepcopy(given)
            resumed.append((others, make_optimizer(RECIPE, others)))
            resumed[0][1].load_state_dict(torch.load(written, weights_only=True))
        elif step == 3:
            resumed.append(copy.deepcopy((given, optimizer)))
        for ours, own in [(given, optimizer), *resumed]:
            give_gradients(ours, step, absent=(step % 2,))
            clip_and_step(own, RECIPE.clip_norm)
    assert all(torch.equal(one, other) for one, other in zip(given, resumed[0][0], strict=True))


def test_a_checkpoint_of_pytorch_s_own_can_be_taken_up_and_the_other_way_round() -> None:
    ours, theirs = parameters(), parameters()
    mine, bare = make_optimizer(RECIPE, ours), pytorch(RECIPE, theirs)
    for step in range(3):
        for given, optimizer in ((ours, mine), (theirs, bare)):
            give_gradients(given, step, ())
            optimizer.step()  # PyTorch's, also on ours
    states = mine.state_dict(), bare.state_dict()
    assert all(
        torch.equal(states[0]["state"][at]["momentum_buffer"], states[1]["state"][at]["momentum_buffer"])
        for at in range(len(SHAPES))
    )
    mine.load_state_dict(copy.deepcopy(states[1]))
    bare.load_state_dict(copy.deepcopy(states[0]))
    for step in range(3, 6):
        for given, optimizer in ((ours, mine), (theirs, bare)):
            give_gradients(given, step, ())
            clip_and_step(optimizer, 0)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["momentum", "decayed", "adam", "adamw"])
def test_the_optimizer_is_the_recipes(kind: str) -> None:
    ours, theirs = make_optimizer(RECIPES[kind], parameters()), pytorch(RECIPES[kind], parameters())
    assert isinstance(ours, type(theirs))
    assert ours.defaults == {**theirs.defaults, "foreach": True}  # the same results, faster


def rates(scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule, seen = scheduler(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_cosine_is_that_of_pytorch() -> None:
    recipe = Recipe(lr=0.3, schedule="cosine")
    wanted = rates(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40), 40)
    assert [learning_rate(recipe, done, 40) for done in range(40)] == pytest.approx(wanted, abs=1e-12)


def test_a_warm_up_is_linear_to_the_full_rate_and_the_cosine_spans_the_rest() -> None:
    recipe = Recipe(lr=0.3, schedule="cosine", warmup_steps=8)

    def both(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 8, total_iters=7)
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], milestones=[8])

    assert [learning_rate(recipe, done, 40) for done in range(40)] == pytest.approx(rates(both, 40), abs=1e-12)


def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    recipe = Recipe(lr=0.3, schedule="constant", warmup_steps=3)
    assert [learning_rate(recipe, done, 10) for done in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])
