"""Pictures of what experts changed, the same to the byte for the same numbers and matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray
from torch import Tensor

from shiftproof.benchmark.analysis.canvas import NOTHING, PLAIN, Pictures, blank, footnote, panels_of, short
from shiftproof.benchmark.analysis.energy import LayerEnergy
from shiftproof.benchmark.analysis.overlap import Overlap
from shiftproof.benchmark.boards.figures import png

Array = NDArray[np.float64]

WIDEST, HIGHEST = 24.0, 40.0  # inches
CELL = 0.17  # inches a row or column of a large heat map
LABEL = 0.13  # inches that a tick label needs
BINS = 512  # of a heat map of Sigma a side; larger ones show the largest entry of each bin
MOST = 6  # layers of which Sigma is drawn


def draw_overlap(found: Overlap) -> Pictures:
    """`overlap.png`, averaged over layers, and `overlap-layers.png`, every layer with every pair of experts."""
    with style.context(["default", PLAIN], after_reset=True):
        return {"overlap.png": png(_averages(found)), "overlap-layers.png": png(_layers(found))}


def draw_sigma(layers: Sequence[tuple[LayerEnergy, Tensor]]) -> Pictures:
    """`sigma.png`: |Sigma_score| of a few layers with the shares of its energy, as in Fig. 3 of the SCORE paper."""
    with style.context(["default", PLAIN], after_reset=True):
        figure, panels = panels_of(len(layers), 3, 3.3, 3.1)
        for axes, (layer, values) in zip(panels, layers, strict=True):
            _sigma_panel(axes, layer, pooled(values.abs().numpy(), BINS))
        footnote(figure, "|Σ| before the trim, brightness by its square root. Titles: energy on / off the diagonal.")
        return {"sigma.png": png(figure)}


def chosen_layers(layers: Sequence[LayerEnergy]) -> list[LayerEnergy]:
    """All, or of too many the three with most, middling and least energy on the diagonal, as Fig. 3 has them."""
    if len(layers) <= MOST:
        return list(layers)
    ranked = sorted(layers, key=lambda layer: -layer.share)
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


def pooled(values: Array, bins: int) -> Array:
    """The largest entry of each bin of a (p, p) matrix, in at most `bins` bins of one size a side."""
    edges = np.arange(0, len(values), math.ceil(len(values) / bins))
    rows: Array = np.maximum.reduceat(values, edges, axis=0)
    found: Array = np.maximum.reduceat(rows, edges, axis=1)
    return found


def _averages(found: Overlap) -> Figure:
    names = [short(name) for name in found.experts]
    side = max(2.6, 0.62 * len(names))
    figure = blank(2 * side + 3.0, side + 1.6)
    left, right = figure.subplots(1, 2)
    for axes, values, title, top in (
        (left, found.sar.numpy(), "subspace alignment ratio", 1.0),
        (right, found.angle.numpy(), "mean principal angle (rad)", math.pi / 2),
    ):
        image = _matrix(axes, values, names, top)
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        axes.set_title(title)
    left.set_ylabel("projected")
    left.set_xlabel("defines the subspace")
    right.set_ylabel("expert")  # an angle has no direction
    right.set_xlabel("expert")
    rule = found.rule
    fewer = ", one vector fewer" if rule.one_fewer else ""
    footnote(figure, f"Mean over {len(found.layers)} layers; epsilon = {rule.epsilon:g}{fewer}. Colours: pairs only.")
    return figure


def _matrix(axes: Axes, values: Array, names: Sequence[str], top: float) -> AxesImage:
    """Numbers upon colours; the diagonal says nothing about a pair and stays grey."""
    pairs = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    axes.set_facecolor(NOTHING)
    image = axes.imshow(pairs, cmap="viridis", vmin=0, vmax=top)
    for (i, j), value in np.ndenumerate(values):
        dark = not np.isnan(pairs[i, j]) and value < 0.6 * top
        text = "-" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    return image


def _layers(found: Overlap) -> Figure:
    count, names = len(found.experts), found.experts
    ordered = [(i, j) for i in range(count) for j in range(count) if i != j]
    pairs = [(i, j) for i, j in ordered if i < j]
    height = min(HIGHEST, 2.2 + CELL * len(found.layers))
    widths = [max(len(ordered) * CELL, 0.8), max(len(pairs) * CELL, 0.8)]
    figure = blank(min(WIDEST, sum(widths) + 4.2), height)
    left, right = figure.subplots(1, 2, width_ratios=widths, sharey=True)
    for axes, cells, what, sign, top, title in (
        (left, ordered, [layer.sar for layer in found.layers], "in", 1.0, "SAR"),
        (right, pairs, [layer.angle for layer in found.layers], "and", math.pi / 2, "angle (rad)"),
    ):
        values = np.array([[float(matrix[i, j]) for i, j in cells] for matrix in what])  # (L, P)
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        labels = [f"{short(names[i], 16)} {sign} {short(names[j], 16)}" for i, j in cells]
        axes.set_xticks(*_thinned(labels, widths[cells is pairs]), rotation=90, fontsize=6)
        axes.set_title(title)
        axes.set_facecolor(NOTHING)
        figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / height), aspect=16, pad=0.02)
    left.set_yticks(*_thinned([short(layer.name, 48) for layer in found.layers], height - 2.2), fontsize=6)
    return figure


def _thinned(labels: Sequence[str], inches: float) -> tuple[list[int], list[str]]:
    """Places and labels; of more than there is room for every second, third and so on."""
    every = max(1, math.ceil(len(labels) * LABEL / max(inches, LABEL)))
    return list(range(0, len(labels), every)), list(labels[::every])


def _sigma_panel(axes: Axes, layer: LayerEnergy, values: Array) -> None:
    extent = (0.5, layer.rank + 0.5, layer.rank + 0.5, 0.5)
    norm = PowerNorm(0.5, 0, max(float(values.max()), np.finfo(np.float64).tiny))
    image = axes.imshow(values, cmap="magma", norm=norm, extent=extent, interpolation="nearest")
    axes.set_title(f"{short(layer.name)}\n{layer.share:.1%} on / {1 - layer.share:.1%} off", fontsize=8)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
