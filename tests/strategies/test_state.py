"""Attributes as a checkpoint that loads without executing code, and back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark import Model, Recipe, RunContext
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.strategies import Heads, ReservoirBuffer
from shiftproof.strategies.state import decode, encode, objects


def base() -> tuple[Model, dict[str, Tensor]]:
    net = SmallConvNet((3, 8, 8), (2, 2, 2))
    return Model(net, {0: 2}), net.state_dict()


@pytest.fixture
def run() -> RunContext:
    return RunContext(0, Recipe(), base, "", Cache(Path("unused")), Path())


def through_a_file(value: Any, current: Any, run: RunContext) -> Any:
    buffer = io.BytesIO()
    torch.save(encode("held", value), buffer)
    buffer.seek(0)
    return decode("held", torch.load(buffer, weights_only=True), current, run)


@pytest.mark.parametrize(
    "value",
    [
        3,
        -2.5,
        float("inf"),
        "text",
        True,
        None,
        [],
        (),
        {},
        [1, (2, "3", [None]), {"a": (True,)}],
        {1: "a", "1": "b", (0, "c"): [1.5], None: {}},
    ],
)
def test_plain_values_come_back_equal_and_of_their_own_type(run: RunContext, value: Any) -> None:
    back = through_a_file(value, None, run)
    assert back == value
    assert repr(back) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_with_type_shape_and_bits(run: RunContext, dtype: torch.dtype) -> None:
    for value in (torch.arange(6).view(2, 3).to(dtype), torch.zeros(0, 4, dtype=dtype), torch.ones((), dtype=dtype)):
        back = through_a_file(value, None, run)
        assert (back.dtype, back.shape, back.requires_grad) == (value.dtype, value.shape, False)
        assert torch.equal(back, value)


def test_two_names_of_one_memory_still_share_it(run: RunContext) -> None:
    tensor = torch.zeros(4)
    whole, part = through_a_file([tensor, tensor[1:3]], None, run)
    part += 1
    assert whole.tolist() == [0, 1, 1, 0]


def test_trained_tensors_stay_trainable_and_are_loaded_in_place_for_an_optimizer_of_ones_own(run: RunContext) -> None:
    held = nn.Parameter(torch.zeros(3))
    back = through_a_file(nn.Parameter(torch.ones(3)), held, run)
    assert back is held
    assert held.tolist() == [1, 1, 1]
    born = through_a_file(nn.Parameter(torch.ones(3)), None, run)
    assert isinstance(born, nn.Parameter)
    leaf = through_a_file(torch.ones(3, requires_grad=True), None, run)
    assert leaf.requires_grad
    assert not isinstance(leaf, nn.Parameter)
    assert not through_a_file(leaf * 2, None, run).requires_grad  # the result of a computation is only its value


def facts(module: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    return (
        {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        {name: part.training for name, part in module.named_modules()},
    )


def test_a_model_comes_back_with_what_is_frozen_and_what_rests(run: RunContext) -> None:
    model = run.new_model()
    model.backbone.requires_grad_(False)
    model.backbone.eval()
    with torch.no_grad():
        model.head(0).weight.add_(1)
    for current in (None, run.new_model()):
        back = through_a_file(model, current, run)
        assert back is current or current is None
        assert facts(back) == facts(model)
        assert all(torch.equal(one, other) for one, other in zip(back.parameters(), model.parameters(), strict=True))


def test_any_module_made_at_construction_is_loaded_in_place_with_its_modes(run: RunContext) -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    net(torch.randn(8, 2))
    net[0].eval()
    current = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert through_a_file(net, current, run) is current
    assert facts(current) == facts(net)
    assert all(torch.equal(current.state_dict()[name], tensor) for name, tensor in net.state_dict().items())


def test_heads_born_during_training_are_rebuilt_in_their_order(run: RunContext) -> None:
    heads = Heads(run)
    for name, classes in (("b", 3), ("a", 2)):
        heads.add(name, 4, classes)
    heads.requires_grad_(False)
    back = through_a_file(heads, None, run)
    assert isinstance(back, Heads)
    assert list(back.sizes().items()) == [("b", [3, 4]), ("a", [2, 4])]
    assert facts(back) == facts(heads)
    assert torch.equal(back.every(torch.ones(1, 4)), heads.every(torch.ones(1, 4)))


def test_objects_with_a_state_dict_are_loaded_in_place_also_deep_inside(run: RunContext) -> None:
    buffer = ReservoirBuffer(4)
    buffer.add(torch.arange(3.0), torch.arange(3), torch.zeros(3, dtype=torch.int64), torch.Generator())
    current: dict[str, Any] = {"a": [0, ReservoirBuffer(4)]}
    back = through_a_file({"a": [1, buffer]}, current, run)
    assert back["a"][0] == 1
    assert back["a"][1] is current["a"][1]
    assert back["a"][1].contents().x.tolist() == [0, 1, 2]


def test_an_object_that_nobody_made_is_an_error_that_names_it(run: RunContext) -> None:
    with pytest.raises(TypeError, match=r"attribute .held\[1\].: make it in __init__"):
        through_a_file([0, ReservoirBuffer(4)], [0], run)


def test_objects_are_listed_with_their_place() -> None:
    value = {"a": [1, ReservoirBuffer(1)], "b": (nn.Linear(1, 1),), "c": torch.zeros(1), "d": nn.Parameter(torch.zeros(1))}
    assert list(objects("held", value)) == ["held['a'][1]", "held['b'][0]"]
    assert list(objects("held", torch.optim.SGD([nn.Parameter(torch.zeros(1))]))) == ["held"]


class Named(dict[str, int]):
    pass


@pytest.mark.parametrize("value", [{1}, Named(a=1), torch.Generator(), object(), lambda: 0, 1j, b"x", Path("x"), torch.float32])
def test_whatever_else_is_an_error_that_names_attribute_and_type(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"attribute .held\['k'\]. holds a {type(value).__name__}, which a checkpoint cannot"):
        encode("held", {"k": value})
