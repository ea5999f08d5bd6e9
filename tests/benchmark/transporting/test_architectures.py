"""Derived specifications against the libraries' own modules: renumbered units leave the outputs as they are."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark.transporting.architectures import derive, derive_model
from shiftproof.benchmark.transporting.residuals import residual_maps, settled
from shiftproof.benchmark.transporting.specification import Permutations, PermutationSpec, Run
from shiftproof.strategies.transport import MatchConfig, Matching
from tests.benchmark.transporting.zoo import NETS, SLOW, Inputs, Net, filled, hugging_face, in_dtype, words

GROUPED = [pytest.param(net, id=name, marks=pytest.mark.xdist_group("slow-imports")) for name, net in SLOW.items()]
EVERY = [*(pytest.param(net, id=name) for name, net in NETS.items()), *GROUPED]
ATTENTIVE = [each for each in EVERY if each.values[0].heads]


def flat(output: object) -> list[Tensor]:
    """All tensors of an output in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in flat(value)]


def change(model: nn.Module, spec: PermutationSpec, permutations: Permutations, inputs: Inputs) -> float:
    """Largest difference of an output of the permuted model, its units back in their places, relative to the largest output."""
    permuted = copy.deepcopy(model)
    permuted.load_state_dict(spec.apply(model.state_dict(), permutations))
    with torch.no_grad():
        before, after = flat(model(*inputs)), flat(permuted(*inputs))
    if spec.output:
        moved = torch.empty_like(after[0])
        moved[..., permutations[spec.output]] = after[0]
        after[0] = moved
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("net", EVERY)
def test_a_random_permutation_leaves_the_outputs_as_they_are(net: Net) -> None:
    model, inputs = filled(net.build()), net.inputs()
    spec = derive_model(model).shared()
    permutations = spec.random(torch.Generator().manual_seed(2))
    assert change(model, spec, permutations, inputs) < 1e-9
    assert change(model.float(), spec, permutations, in_dtype(inputs, torch.float32)) < 1e-5


@pytest.mark.parametrize("net", EVERY)
@pytest.mark.parametrize("form", ["segments", "shared"])
def test_a_permutation_that_was_found_leaves_the_outputs_as_they_are(net: Net, form: str) -> None:
    model, inputs = filled(net.build()), net.inputs()
    spec = derive_model(model) if form == "segments" else derive_model(model).shared()
    generator = torch.Generator().manual_seed(9)
    source = model.state_dict()
    target = {name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in source.items()}
    found = Matching(source, target, spec, MatchConfig(max_sweeps=5)).run()
    assert any(not units.equal(units.sort().values) for units in found.permutations.values())
    # With its residual maps, the network is the plain one whose streams all have the permutation of their first segment.
    first = {name: found.permutations[chain[0]] for chain in spec.chains for name in chain}
    plain = {**found.permutations, **first}
    with_maps = settled(spec, found.apply(source), residual_maps(spec, found.permutations))
    assert all(tensor.equal(with_maps[name]) for name, tensor in spec.apply(source, plain).items())
    assert change(model, spec, plain, inputs) < 1e-9
    assert change(model.float(), spec, plain, in_dtype(inputs, torch.float32)) < 1e-5


@pytest.mark.parametrize("net", EVERY)
def test_every_permutation_moves_weights_and_has_its_place(net: Net) -> None:
    spec = derive_model(net.build())
    assert (len(spec.sizes), len(spec.shared().sizes)) == (net.segments, net.shared)
    assert all(spec.slots[name] for name in spec.sizes)
    assert all(len(chain) > 1 for chain in spec.chains)


@pytest.mark.parametrize("net", ATTENTIVE)
def test_a_permutation_that_mixes_heads_changes_the_outputs(net: Net) -> None:
    model = filled(net.build())
    spec = derive_model(model).shared()
    for name, heads in spec.heads.items():
        # The first unit of the first head and the first of the second change places.
        swapped = torch.arange(spec.sizes[name])
        second = spec.sizes[name] // heads
        swapped[[0, second]] = swapped[[second, 0]]
        assert change(model, spec, spec.identity() | {name: swapped}, net.inputs()) > 1e-6


@pytest.mark.parametrize("net", [each for each in EVERY if each.values[0].heads >= 0])
def test_names_and_shapes_tell_what_the_module_tells_but_for_the_heads(net: Net) -> None:
    model = net.build()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert derive(shapes, net.heads) == derive_model(model)


@pytest.mark.parametrize("net", EVERY)
def test_a_prefix_of_all_names_changes_the_names_alone(net: Net) -> None:
    inner = net.build()
    outer = nn.Module()
    outer.module = inner
    plain, below = derive_model(inner), derive_model(outer)
    assert list(below.axes) == [f"module.{name}" for name in plain.axes]
    assert list(below.sizes.items()) == [(f"module.{name}", size) for name, size in plain.sizes.items()]


slow = pytest.mark.xdist_group("slow-imports")


@slow
def test_a_pooler_has_units_of_its_own_where_a_classifier_reads_them() -> None:
    headless, classifier = (hugging_face(f"Bert{name}", "BertConfig") for name in ("Model", "ForSequenceClassification"))
    assert derive_model(headless).axes["pooler.dense.bias"] == ((),)
    spec = derive_model(classifier)
    assert spec.axes["classifier.weight"] == ((), (Run("bert.pooler.dense"),))
    assert spec.axes["bert.pooler.dense.weight"] == ((Run("bert.pooler.dense"),), (Run("bert.encoder.layer.1.stream"),))


class OwnHead(nn.Module):
    """A head of one's own on a BERT, on the pooler's output or past it."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.bert = hugging_face("BertModel", "BertConfig")
        self.fc = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(getattr(self.bert(tokens), self.output))


@slow
@pytest.mark.parametrize("output", ["pooler_output", "last_hidden_state"])
def test_a_head_of_ones_own_may_read_the_pooler_or_pass_it_by(output: str) -> None:
    model = filled(OwnHead(output))
    spec = derive_model(model).shared()
    assert change(model, spec, spec.random(torch.Generator().manual_seed(2)), (words(),)) < 1e-9


@slow
def test_the_names_of_older_checkpoints_of_a_hugging_face_vit_are_known() -> None:
    old = {
        "vit.layers": "vit.encoder.layer",
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    pattern = re.compile("|".join(map(re.escape, old)))

    def older(name: str) -> str:
        return pattern.sub(lambda match: old[match[0]], name)

    model = hugging_face("ViTForImageClassification", "ViTConfig")
    shapes = {older(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert "vit.encoder.layer.1.attention.attention.query.weight" in shapes
    new, before = derive_model(model), derive(shapes, heads=4)
    for name, axes in new.axes.items():
        renamed = [tuple(Run(older(run.permutation), run.repeat) for run in axis) for axis in axes]
        assert list(before.axes[older(name)]) == renamed
