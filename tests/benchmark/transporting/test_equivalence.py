"""The numerical check of a specification finds what is wrong and leaves the model alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.equivalence import check_equivalence
from shiftproof.benchmark.transporting.specification import Axis, PermutationSpec, Run
from tests.benchmark.transporting.zoo import NETS, filled, hugging_face, in_dtype, vectors, words


def with_axis(spec: PermutationSpec, tensor: str, dimension: int, axis: Axis) -> PermutationSpec:
    axes = list(spec.axes[tensor])
    axes[dimension] = axis
    return replace(spec, axes={**spec.axes, tensor: tuple(axes)})


@pytest.mark.parametrize("name", ["small-vit-tasks", "small-resnet", "conv-stack", "encoder"])
def test_any_axis_that_is_left_out_is_found(name: str) -> None:
    net = NETS[name]
    model, inputs = filled(net.build()), net.inputs()
    spec = derive_model(model)
    assert check_equivalence(model, spec, inputs, 1e-9) < 1e-9
    carrying = [(tensor, at) for tensor, axes in spec.axes.items() for at, axis in enumerate(axes) if axis]
    assert len(carrying) > 10
    for tensor, at in carrying:
        with pytest.raises(InputError, match="expected the same outputs to 1e-09 under any permutation"):
            check_equivalence(model, with_axis(spec, tensor, at, ()), inputs, 1e-9)


def test_the_permutation_that_is_wrong_is_named() -> None:
    net = NETS["mlp"]
    model = filled(net.build()).float()
    spec, inputs = derive_model(model), in_dtype(net.inputs(), torch.float32)
    assert 0 < check_equivalence(model, spec, inputs) < 1e-5
    with pytest.raises(InputError, match=r"to 1e-05 under any permutation, got a difference of \S+; look at the axes of 3$"):
        check_equivalence(model, with_axis(spec, "3.bias", 0, ()), inputs)


def test_an_axis_in_another_order_is_found() -> None:
    net = NETS["conv-stack"]
    model = filled(net.build())
    spec = derive_model(model)
    # A flattened map has its places one after another, not the units.
    assert spec.axes["8.weight"] == ((Run("8"),), (Run("3", 16),))
    with pytest.raises(InputError, match=r"look at the axes of 3$"):
        check_equivalence(model, with_axis(spec, "8.weight", 1, (Run("3"),) * 16), net.inputs())


def test_mixed_heads_are_found() -> None:
    net = NETS["encoder"]
    model = filled(net.build())
    with pytest.raises(InputError, match=r"look at the axes of layers\.\d\.attention, layers\.\d\.attention$"):
        check_equivalence(model, derive_model(model).without_heads(), net.inputs())


def test_the_model_is_left_as_it_was() -> None:
    net = NETS["small-resnet"]
    model = filled(net.build()).train()
    model.stages[0].eval()
    before, training = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    check_equivalence(model, derive_model(model), net.inputs())
    with pytest.raises(InputError):
        check_equivalence(model, with_axis(derive_model(model), "stem.weight", 0, ()), net.inputs())
    assert [module.training for module in model.modules()] == training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_dropout_plays_no_part() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    assert check_equivalence(model, derive_model(model), (vectors(4, 6),), 1e-9) < 1e-9


@pytest.mark.xdist_group("slow-imports")
def test_the_first_of_several_outputs_carries_the_permutation() -> None:
    model = filled(hugging_face("BertModel", "BertConfig"))
    spec = derive_model(model)
    assert spec.output == "encoder.layer.1.stream"
    assert check_equivalence(model, spec, (words(),), 1e-9) < 1e-9
    with pytest.raises(InputError, match=r"look at the axes of stream$"):
        check_equivalence(model, replace(spec, output=""), (words(),), 1e-9)


def test_an_output_of_another_width_is_refused() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = NETS["small-resnet"].build()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sum(1, keepdim=True)

    model = filled(Sum())
    with pytest.raises(InputError, match=r"expected an output with 64 units along its last axis, got \(2, 1\)"):
        check_equivalence(model, derive_model(model), NETS["small-resnet"].inputs())


@pytest.mark.parametrize(("value", "message"), [(0.0, "outputs other than 0"), (float("nan"), "returns finite numbers")])
def test_outputs_that_tell_nothing_are_refused(value: float, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    nn.init.constant_(model[1].weight, value)
    nn.init.zeros_(model[1].bias)
    with pytest.raises(InputError, match=message):
        check_equivalence(model, derive_model(model), (torch.ones(2, 6),))


def test_the_specification_of_another_model_is_refused() -> None:
    model, other = nn.Sequential(nn.Linear(6, 3)), nn.Sequential(nn.Linear(6, 3, bias=False))
    with pytest.raises(InputError, match=r"for the tensors of this model, got others \(0\.bias\)"):
        check_equivalence(model, derive_model(other), (torch.ones(2, 6),))
