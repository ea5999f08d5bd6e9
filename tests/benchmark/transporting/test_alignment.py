"""Task vectors, alignments in files, and what is told of an alignment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.alignment import Alignment, Search, added, task_vector
from shiftproof.benchmark.transporting.diagnostics import WHOLE, matches, moves
from shiftproof.benchmark.transporting.files import identity_of, load_alignment, save_alignment
from tests.releases import drawn, renumbered, whole


def planted(noise: float = 0.0) -> tuple[Alignment, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The true alignment of two releases."""
    source = drawn(0)
    target, units = renumbered(source, 1, noise)
    return Alignment(whole(), units, Search((1.0, 2.5), True, 7, {"products": 0.1})), source, target


def test_a_task_vector_has_parameters_of_one_shape_alone() -> None:
    before = {"w": torch.ones(2), "n": torch.tensor(3), "bn.running_mean": torch.zeros(2), "head": torch.ones(3)}
    after = {
        "w": torch.full((2,), 1.5),
        "n": torch.tensor(4),
        "bn.running_mean": torch.ones(2),
        "head": torch.ones(5),
        "new": torch.ones(1),
    }
    assert {name: tensor.tolist() for name, tensor in task_vector(before, after).items()} == {"w": [0.5, 0.5]}


def test_adding_scales_and_keeps_dtypes_and_what_has_no_part() -> None:
    target = {"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    moved = added(target, {"w": torch.full((2,), 0.25)}, alpha=2.0)
    assert moved["w"].dtype == torch.bfloat16
    assert moved["w"].tolist() == [1.5, 1.5]
    assert moved["n"] is target["n"]


def test_the_difference_of_half_precision_weights_is_taken_in_single() -> None:
    before, after = torch.tensor([1.0], dtype=torch.float16), torch.tensor([1.0009765625], dtype=torch.float16)
    vector = task_vector({"w": before}, {"w": after})["w"]
    assert vector.dtype == torch.float32
    assert float(vector) == 0.0009765625


def test_an_alignment_comes_back_from_its_file(tmp_path: Path) -> None:
    alignment, source, target = planted()
    identity = identity_of(source, target)
    save_alignment(tmp_path / "a.safetensors", alignment, {"method": "m", **identity})
    found, facts = load_alignment(tmp_path / "a.safetensors", whole(), identity)
    assert all(found.permutations[name].equal(units) for name, units in alignment.permutations.items())
    assert facts["method"] == "m"
    assert found.search.objective == (1.0, 2.5)


def test_an_alignment_of_other_models_is_refused(tmp_path: Path) -> None:
    alignment, source, target = planted()
    save_alignment(tmp_path / "a.safetensors", alignment, identity_of(source, target))
    with pytest.raises(InputError, match="expected an alignment made for this target base"):
        load_alignment(tmp_path / "a.safetensors", whole(), identity_of(source, drawn(5)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda units: {"other": units["backbone.stream"]}, "of this architecture"),
        (lambda units: {**units, "backbone.stream": torch.zeros(16, dtype=torch.int64)}, "as a permutation of 16 units"),
        (lambda units: {**units, "backbone.stream": torch.arange(15)}, "as a permutation of 16 units"),
    ],
)
def test_a_file_that_is_no_alignment_of_this_architecture_is_refused(tmp_path: Path, change, said: str) -> None:  # type: ignore[no-untyped-def]
    alignment, source, target = planted()
    broken = Alignment(whole(), change(dict(alignment.permutations)))
    save_alignment(tmp_path / "a.safetensors", broken, identity_of(source, target))
    with pytest.raises(InputError, match=said):
        load_alignment(tmp_path / "a.safetensors", whole(), identity_of(source, target))


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name in ("w", "text", "missing"):
        with pytest.raises(InputError, match=r"expected an alignment in .*; --save-alignment writes one"):
            load_alignment(tmp_path / f"{name}.safetensors", whole(), {})


def test_similarities_are_cosines_of_each_layer_and_of_all() -> None:
    alignment, source, target = planted()
    rows = {row.layer: row for row in matches(alignment, source, target)}
    assert all(row.matched == pytest.approx(1.0) for row in rows.values())
    name = "backbone.blocks.0.mlp.fc1"
    ours, theirs = (
        torch.cat([state[f"{name}.{part}"].reshape(-1) for part in ("weight", "bias")]) for state in (target, source)
    )
    assert rows[name].before == pytest.approx(float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)), abs=1e-6)
    assert rows[WHOLE].parameters == sum(row.parameters for row in rows.values() if row.layer != WHOLE)
    assert abs(rows[WHOLE].random) < 0.2 < rows[WHOLE].matched


def test_units_and_heads_that_move_are_counted_by_hand() -> None:
    units = whole().identity()
    name = "backbone.blocks.0.attention"  # 4 heads of 4 units
    units[name] = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 9, 8, 10, 11, 12, 13, 14, 15])
    found = {one.permutation: one for one in moves(Alignment(whole(), units))}
    assert found[name].units == 10 / 16
    assert found[name].heads == 2 / 4
    assert found["backbone.stream"].units == 0
    assert found["backbone.stream"].heads is None
