"""Analyses as text and as JSON. Oracle: the numbers that go in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shiftproof.benchmark.analysis import tables
from shiftproof.benchmark.analysis.barrier import Barrier
from shiftproof.benchmark.analysis.deltas import Deltas
from shiftproof.benchmark.analysis.energy import energies
from shiftproof.benchmark.analysis.measuring import Measured
from shiftproof.benchmark.analysis.overlap import SubspaceRule, overlap
from shiftproof.benchmark.analysis.sweep import Sweep

DeltasOf = Callable[..., Deltas]


def strict(content: dict[str, Any]) -> dict[str, Any]:
    """Through JSON and back, which has no NaN."""
    found: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return found


@pytest.fixture
def deltas(deltas_of: DeltasOf) -> Deltas:
    """x and y share a column space in the first layer; y changed nothing in the second, nobody anything in the third."""
    one = torch.zeros(4, 3, dtype=torch.float64)
    one[0, 0] = 1.0
    nothing = torch.zeros_like(one)
    return deltas_of(x={"0": one, "1": one, "2": nothing}, y={"0": 2 * one, "1": nothing, "2": nothing})


def test_overlap_is_told_by_pairs_and_by_layers(deltas: Deltas) -> None:
    sar, angle, layers = tables.overlap_tables(overlap(deltas))
    assert sar == (["mean SAR", "x", "y"], [["x", "1.000", "1.000"], ["y", "1.000", "1.000"]])
    assert angle.rows == [["x", "0.000", "0.000"], ["y", "0.000", "0.000"]]
    assert layers.header == ["layer", "shape", "k", "SAR", "lowest", "highest", "by chance", "angle (rad)"]
    assert layers.rows == [["0", "4x3", "1", "1.000", "1.000", "1.000", "0.500", "0.000"], ["1", "4x3", "1", *["-"] * 5]]


def test_what_is_not_known_is_null(deltas: Deltas) -> None:
    content = strict(tables.overlap_json(overlap(deltas, rule=SubspaceRule(0.5, True))))
    assert (content["epsilon"], content["one_fewer"], content["unchanged"]) == (0.5, True, ["2"])
    assert content["layers"][1]["sar"] == [[pytest.approx(1), None], [None, None]]
    assert content["layers"][1]["k"] == [1, 0]


def test_energy_is_told_from_the_most_diagonal_layer_on(deltas: Deltas) -> None:
    found = energies(deltas)
    (table,) = tables.sigma_tables(found)
    assert [row[:4] for row in table.rows] == [["1", "4x3", "1", "1"], ["0", "4x3", "2", "2"]]
    assert [row[-2:] for row in table.rows] == [["100.0%", "0.0%"], ["50.0%", "50.0%"]]
    content = strict(tables.sigma_json(found))
    assert [layer["name"] for layer in content["layers"]] == ["0", "1"]
    assert content["layers"][0]["share"] == pytest.approx(0.5)


def test_a_sweep_is_told_by_its_marked_points_and_holds_the_grid() -> None:
    good, bad = Measured((0.9, 0.7), (0.1, 0.3)), Measured((math.nan, 0.2), (math.nan, 2.0))
    found = Sweep(("a", "b"), ("e", "f"), (0.0, 1.0), ((bad, good), (bad, bad)), {"sum": ((1.0, 1.0), bad)})
    (table,) = tables.sweep_tables(found)
    assert table.header == ["point", "of a", "of b", "accuracy", "loss", "e", "f"]
    assert table.rows == [
        ["sum", "1", "1", "-", "-", "-", "20.0%"],
        ["best", "0", "1", "80.0%", "0.200", "90.0%", "70.0%"],
    ]
    content = strict(tables.sweep_json(found))
    assert content["accuracy"][0] == [[None, 0.2], [0.9, 0.7]]
    assert content["points"]["best"]["coefficients"] == [0.0, 1.0]


def test_a_barrier_is_told_by_points_and_says_where_it_is_highest() -> None:
    points = [Measured((0.5, 0.5), losses) for losses in ((1.0, 1.0), (1.0, 3.0), (1.0, 1.0))]
    found = Barrier(("a", "b"), ("e", "f"), (0.0, 0.5, 1.0), tuple(points))
    (table,) = tables.barrier_tables(found)
    assert table.rows[1] == ["0.5", "2.000", "1.000", "1.000", "50.0%", "50.0%", "50.0%"]
    assert tables.barrier_note(found) == "barrier: 1.000 of the mean over eval sets; highest 2.000 on f"
    content = strict(tables.barrier_json(found))
    assert (content["barrier"], content["barriers"]) == (1.0, [0.0, 2.0])
    alone = Barrier(("a", "b"), ("e",), (0.0, 0.5, 1.0), tuple(Measured((0.5,), one.losses[1:]) for one in points))
    assert tables.barrier_note(alone) == "barrier: 2.000 on e"


def test_what_was_left_out_is_named_up_to_three() -> None:
    assert tables.unchanged_note([]) == ""
    assert tables.unchanged_note(list("abcde")) == "skipped, since no expert changed them: a, b, c and 2 more"
