"""Pictures of analyses. Oracles: matplotlib's own reader, numpy."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from matplotlib import image, rc_context
from matplotlib.figure import Figure

from shiftproof.benchmark.analysis import figures
from shiftproof.benchmark.analysis.barrier import Barrier
from shiftproof.benchmark.analysis.canvas import short
from shiftproof.benchmark.analysis.deltas import Deltas
from shiftproof.benchmark.analysis.energy import LayerEnergy, energies, sigma_of
from shiftproof.benchmark.analysis.figures import chosen_layers, draw_overlap, draw_sigma, pooled
from shiftproof.benchmark.analysis.landscapes import draw_barrier, draw_sweep
from shiftproof.benchmark.analysis.measuring import Measured
from shiftproof.benchmark.analysis.overlap import overlap
from shiftproof.benchmark.analysis.sweep import Sweep

Draw = Callable[[], dict[str, bytes]]


@pytest.fixture
def deltas(deltas_of: Callable[..., Deltas]) -> Deltas:
    generator = torch.Generator().manual_seed(0)
    names = [f"visual.transformer.resblocks.{place}.attn.in_proj_weight" for place in range(4)]
    experts = ("clip$_$art", "sketch", "a-name-that-is-a-good-deal-longer-than-all-the-others")
    made = {one: {name: torch.randn(8, 6, generator=generator, dtype=torch.float64) for name in names} for one in experts}
    made["sketch"][names[0]].zero_()
    return deltas_of(**made)


def swept(sets: int, value: float = 0.5) -> Sweep:
    grid = tuple(tuple(Measured((value * i / (1 + j),) * sets, (1.0,) * sets) for j in range(3)) for i in range(3))
    corners = {name: (point, grid[0][0]) for name, point in {"base": (0.0, 0.0), "mean": (0.5, 0.5), "sum": (1.0, 1.0)}.items()}
    return Sweep(("first", "second"), tuple(f"set-{place}" for place in range(sets)), (0.0, 0.5, 1.0), grid, corners)


def line(*losses: float, sets: int = 1) -> Barrier:
    points = tuple(place / (len(losses) - 1) for place in range(len(losses)))
    measured = tuple(Measured((0.5,) * sets, (loss,) * sets) for loss in losses)
    return Barrier(("first", "second"), tuple(f"set-{place}" for place in range(sets)), points, measured)


@pytest.fixture
def drawings(deltas: Deltas) -> dict[str, Draw]:
    found, energy = overlap(deltas), energies(deltas)
    layers = [(layer, sigma_of(deltas, layer.name)) for layer in energy.layers]
    return {
        "overlap": lambda: draw_overlap(found),
        "sigma": lambda: draw_sigma(layers),
        "sweep": lambda: draw_sweep(swept(2)),
        "barrier": lambda: draw_barrier(line(1.0, 2.5, 2.0, sets=8)),
    }


@pytest.mark.parametrize("name", ["overlap", "sigma", "sweep", "barrier"])
def test_pictures_are_the_same_to_the_byte_and_hold_no_metadata(name: str, drawings: dict[str, Draw]) -> None:
    first = drawings[name]()
    with rc_context({"font.size": 20, "axes.facecolor": "red"}):
        second = drawings[name]()
    assert first == second
    assert next(iter(first)) == f"{name}.png"
    for one in first.values():
        assert b"tEXt" not in one
        pixels = image.imread(BytesIO(one))
        assert pixels.shape[1] >= 700
        assert float((pixels[..., :3].min(2) < 0.6).mean()) > 0.005  # something is drawn
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert float(edge[:, :3].min()) == 1.0  # and nothing is cut off


def test_what_is_not_finite_is_drawn_as_nothing() -> None:
    nan = float("nan")
    for one in (draw_sweep(swept(1, nan))["sweep.png"], draw_barrier(line(1.0, nan, 2.0))["barrier.png"]):
        assert image.imread(BytesIO(one)).size > 0


def test_both_panels_of_an_overlap_say_what_their_axes_are(deltas: Deltas, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "png", lambda figure: drawn.append(figure))
    draw_overlap(overlap(deltas))
    left, right = drawn[0].axes[:2]
    assert (left.get_ylabel(), left.get_xlabel()) == ("projected", "defines the subspace")
    assert (right.get_ylabel(), right.get_xlabel()) == ("expert", "expert")


@given(side=st.integers(1, 40), bins=st.integers(1, 50))
def test_bins_keep_every_peak_in_its_place(side: int, bins: int) -> None:
    values = np.random.Generator(np.random.PCG64(side)).random((side, side))
    found = pooled(values, bins)
    width = -(-side // bins)
    assert max(found.shape) <= bins
    assert found.shape[0] == -(-side // width)
    for (i, j), peak in np.ndenumerate(found):
        assert peak == values[i * width : (i + 1) * width, j * width : (j + 1) * width].max()


def test_of_many_layers_the_most_the_middling_and_the_least_diagonal_are_drawn() -> None:
    layers = [LayerEnergy(str(share), (4, 4), 2, 4, share, 10 - share) for share in (3, 9, 1, 7, 5, 8, 2)]
    assert [layer.name for layer in chosen_layers(layers)] == ["9", "5", "1"]
    assert chosen_layers(layers[:6]) == layers[:6]


def test_a_long_name_loses_its_first_parts_but_for_numbers() -> None:
    assert short("a" * 34) == "a" * 34
    assert short("x" * 60, 10) == "..." + "x" * 10
    assert short("visual.transformer.resblocks.11.mlp.c_proj.weight", 30) == "...resblocks.11.mlp.c_proj.weight"
    assert short("visual.transformer.resblocks.11.mlp.c_proj.weight", 24) == "...11.mlp.c_proj.weight"
    assert short("visual.transformer.resblocks.11.mlp.c_proj.weight", 18) == "...11...c_proj.weight"


def test_labels_of_layers_of_a_vision_transformer_differ() -> None:
    names = [f"encoder.layers.encoder_layer_{place}.self_attention.out_proj" for place in range(12)]
    labels = [short(name) for name in names]
    assert len(set(labels)) == 12
    assert labels[11] == "...encoder_layer_11...out_proj"
