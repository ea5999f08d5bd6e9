"""Weight matching against planted permutations, exhaustive search, a plain loop, and the function of the network."""

from __future__ import annotations

import itertools
from dataclasses import replace
from statistics import median

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.residuals import residual_maps, settled
from shiftproof.benchmark.transporting.specification import PermutationSpec, Run, specify
from shiftproof.strategies.transport.matching import MatchConfig, Matching
from tests.releases import alike, answers, drawn, noisy, renumbered, whole

CONFIGS = {
    "spectral": MatchConfig(),
    "brute-force": MatchConfig(heads="brute-force"),
    "released": MatchConfig(include_out_proj=True, order="random", schedule="released"),
    "backward": MatchConfig(order="backward"),
    "weights alone": MatchConfig(biases=False),
    "attention biases": MatchConfig(attention_biases=True),
}


def mlp() -> tuple[PermutationSpec, StateDict]:
    """Three layers of 6, 8 and 5 units."""
    h1, h2 = (Run("first"),), (Run("second"),)
    axes = {"0.weight": (h1, ()), "0.bias": (h1,), "1.weight": (h2, h1), "1.bias": (h2,), "2.weight": ((), h2)}
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "1.weight": (8, 6), "1.bias": (8,), "2.weight": (5, 8)}
    generator = torch.Generator().manual_seed(0)
    return specify(axes, shapes), {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def found(source: StateDict, target: StateDict, spec: PermutationSpec, config: MatchConfig = CONFIGS["spectral"]) -> Matching:
    matching = Matching(source, target, spec, config)
    matching.run()
    return matching


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("form", ["segments", "shared"])
def test_planted_permutations_under_noise_are_found_exactly_in_a_transformer(config: MatchConfig, form: str) -> None:
    source = drawn(0)
    target, planted = renumbered(source, 1, noise=0.02)
    spec = whole() if form == "segments" else whole().shared()
    alignment = Matching(source, target, spec, config).run()
    assert alignment.search.converged
    permutations = whole().spread(alignment.permutations)
    assert all(permutations[name].equal(units) for name, units in planted.items())


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_planted_permutations_under_noise_are_found_exactly_in_an_mlp(order: str) -> None:
    spec, source = mlp()
    planted = spec.random(torch.Generator().manual_seed(4))
    target = noisy(spec.apply(source, planted), 0.05)
    permutations = Matching(source, target, spec, replace(MatchConfig(), order=order)).run().permutations
    assert all(permutations[name].equal(units) for name, units in planted.items())


def test_one_assignment_is_the_best_of_all_permutations() -> None:
    spec, source = mlp()
    target = {name: torch.randn_like(tensor) for name, tensor in source.items()}
    one = replace(spec, axes={**spec.axes, "1.weight": (((), spec.axes["1.weight"][1]))})
    one = specify({**one.axes, "1.bias": ((),), "2.weight": ((), ())}, {n: tuple(t.shape) for n, t in source.items()})
    reached = Matching(source, target, one, MatchConfig()).run().search.objective[-1]
    values = []
    for units in itertools.permutations(range(6)):
        moved = one.apply(source, {"first": torch.tensor(units)})
        values.append(sum(float((moved[n].double() * target[n].double()).sum()) for n in ("0.weight", "0.bias", "1.weight")))
    assert reached == pytest.approx(max(values), rel=1e-6)


def test_the_objective_is_the_inner_product_and_never_falls() -> None:
    source, target = drawn(0), drawn(1)
    matching = Matching(source, target, whole().shared(), replace(MatchConfig(), attention_biases=True, include_out_proj=True))
    alignment = matching.run()
    objective, moved = alignment.search.objective, alignment.apply(source)
    permuted = [name for name, axes in whole().axes.items() if any(axes)]
    assert objective[-1] == pytest.approx(sum(float((moved[n] * target[n]).sum()) for n in permuted), rel=1e-5)
    assert list(objective[1:]) == sorted(objective[1:])  # the choice of heads comes first, and goes by another measure


def plain_ascent(
    source: StateDict, target: StateDict, spec: PermutationSpec, order: list[str]
) -> tuple[dict[str, torch.Tensor], float]:
    """Coordinate ascent as it is written down: every permutation at every sweep, dense products over all its axes."""
    permutations = spec.identity()
    for _ in range(100):
        changed = False
        for name in order:
            total = torch.zeros(spec.sizes[name], spec.sizes[name], dtype=torch.float64)
            for slot in spec.slots[name]:
                others = {key: units for key, units in permutations.items() if key != name}
                ours = target[slot.tensor].double().movedim(slot.axis, 0).reshape(spec.sizes[name], -1)
                theirs = spec.apply_to(slot.tensor, source[slot.tensor], others).double()
                total += ours @ theirs.movedim(slot.axis, 0).reshape(spec.sizes[name], -1).T
            units = torch.from_numpy(linear_sum_assignment(total.numpy(), maximize=True)[1])
            rows = torch.arange(len(units))
            if total[rows, units].sum() > total[rows, permutations[name]].sum() + 1e-6:
                permutations[name], changed = units, True
        if not changed:
            break
    moved = spec.apply(source, permutations)
    return permutations, sum(float((moved[n].double() * target[n].double()).sum()) for n in source)


def test_passing_over_what_has_not_changed_alters_nothing() -> None:
    spec, source = mlp()
    target = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) for name, t in source.items()}
    ours = Matching(source, target, spec, MatchConfig()).run()
    theirs, value = plain_ascent(source, target, spec, list(spec.sizes))
    assert all(ours.permutations[name].equal(units) for name, units in theirs.items())
    assert ours.search.objective[-1] == pytest.approx(value, rel=1e-6)
    assert ours.search.visits < ours.search.sweeps * len(spec.sizes)


def test_independent_nets_are_brought_at_least_as_near_as_by_the_median_order_of_a_plain_ascent() -> None:
    spec, source = mlp()
    target = {name: torch.randn(t.shape, generator=torch.Generator().manual_seed(8)) for name, t in source.items()}
    values = []
    for seed in range(10):
        names = list(spec.sizes)
        order = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]
        values.append(plain_ascent(source, target, spec, order)[1])
    assert Matching(source, target, spec, MatchConfig()).run().search.objective[-1] >= median(values) - 1e-4


@pytest.mark.parametrize("heads", ["spectral", "brute-force", "identity"])
def test_heads_move_as_a_whole_and_the_function_stays(heads: str) -> None:
    source = drawn(0)
    alignment = Matching(source, drawn(1), whole().shared(), replace(MatchConfig(), heads=heads)).run()
    for name, count in alignment.specification.heads.items():
        owners = alignment.permutations[name].reshape(count, -1) // (16 // count)
        assert bool((owners == owners[:, :1]).all())
        assert heads != "identity" or owners[:, 0].tolist() == list(range(count))
    assert alike(answers(source), answers(alignment.apply(source)))


def test_one_permutation_a_segment_keeps_the_function_with_residual_maps_and_not_without() -> None:
    source = drawn(0)
    alignment = Matching(source, drawn(1), whole(), MatchConfig()).run()
    moved = alignment.apply(source)
    maps = residual_maps(alignment.specification, alignment.permutations)
    assert alike(answers(source), answers(settled(alignment.specification, moved, maps)))
    assert not alike(answers(source), answers(moved), 1e-2)


def test_without_heads_units_change_heads_and_the_function_is_lost() -> None:
    source = drawn(0)
    alignment = Matching(source, drawn(1), whole().shared().without_heads(), MatchConfig()).run()
    owners = alignment.permutations["backbone.blocks.0.attention"].reshape(4, -1) // 4
    assert not bool((owners == owners[:, :1]).all())
    assert not alike(answers(source), answers(alignment.apply(source)), 1e-2)


def test_biases_tell_units_apart_that_have_the_same_weights() -> None:
    spec, source = mlp()
    source["0.weight"] = source["0.weight"][:1].expand(6, -1).clone()
    source["1.weight"] = source["1.weight"][:, :1].expand(-1, 6).clone()
    planted = {"first": torch.tensor([3, 1, 0, 2, 5, 4]), "second": torch.arange(8)}
    target = spec.apply(source, planted)
    assert found(source, target, spec).permutations["first"].equal(planted["first"])
    assert not found(source, target, spec, MatchConfig(biases=False)).permutations["first"].equal(planted["first"])


def test_the_output_projection_tells_heads_apart_that_have_the_same_queries_keys_and_values() -> None:
    source = drawn(0)
    name = "backbone.blocks.0.attn.qkv."
    for part in ("weight", "bias"):
        tensor = source[name + part].view(3, 4, 4, -1)
        source[name + part] = tensor[:, :1].expand(-1, 4, -1, -1).reshape(source[name + part].shape).clone()
    source["backbone.blocks.0.attn.proj.weight"] *= torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(4)
    target, planted = renumbered(source, 1)
    order = planted["backbone.blocks.0.attention"]
    with_it = found(source, target, whole().shared(), MatchConfig(include_out_proj=True))
    assert with_it.permutations["backbone.blocks.0.attention"].equal(order)
    assert not found(source, target, whole().shared()).permutations["backbone.blocks.0.attention"].equal(order)


def test_the_released_schedule_leaves_units_within_heads_alone_until_the_heads_have_settled() -> None:
    config = replace(CONFIGS["released"], max_sweeps=1)
    alignment = Matching(drawn(0), drawn(1), whole(), config).run()
    assert not alignment.search.converged
    for name, count in alignment.specification.heads.items():
        units = alignment.permutations[name].reshape(count, -1)
        assert bool((units % (16 // count) == torch.arange(16 // count)).all())


def test_a_random_order_is_that_of_its_seed() -> None:
    def of(seed: int) -> float:
        return Matching(drawn(0), drawn(1), whole(), MatchConfig(order="random", order_seed=seed)).run().search.objective[-1]

    assert of(1) == of(1)
    assert len({of(seed) for seed in range(4)}) > 1


def test_models_in_double_precision_and_in_half_are_matched_too() -> None:
    source = drawn(0)
    target, planted = renumbered(source, 1)
    for dtype in (torch.float64, torch.bfloat16):
        ours, theirs = ({name: tensor.to(dtype) for name, tensor in state.items()} for state in (source, target))
        permutations = found(ours, theirs, whole().shared()).permutations
        assert all(planted[name].equal(units) for name, units in permutations.items())
