"""Pictures of what models reach: over two coefficients, and on the line between two experts."""

from __future__ import annotations

import math

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from shiftproof.benchmark.analysis.barrier import Barrier, chord
from shiftproof.benchmark.analysis.canvas import NOTHING, PLAIN, Pictures, blank, panels_of, short
from shiftproof.benchmark.analysis.sweep import DEFAULTS, Sweep, at
from shiftproof.benchmark.boards.figures import COLOURS, STYLE, png

THIN = tuple(colour for colour in COLOURS if colour != "#000000")  # black is the mean
MARKERS = {"mean": "o", "sum": "s", "best": "*"}


def draw_sweep(found: Sweep) -> Pictures:
    """`sweep.png`: accuracy over both coefficients, with the defaults and the best; the mean over eval sets comes first."""
    columns: list[int | None] = [None, *range(len(found.eval_sets))] if len(found.eval_sets) > 1 else [0]
    with style.context(["default", PLAIN], after_reset=True):
        figure, panels = panels_of(len(columns), 4, 3.2, 3.0)
        for axes, column in zip(panels, columns, strict=True):
            _sweep_panel(axes, found, column)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
        return {"sweep.png": png(figure)}


def draw_barrier(found: Barrier) -> Pictures:
    """`barrier.png`: loss and accuracy on the line between two models, with the barrier."""
    with style.context(["default", STYLE], after_reset=True):
        figure = blank(9.0, 4.2)
        left, right = figure.subplots(1, 2)
        for axes, losses in ((left, True), (right, False)):
            _lines(axes, found, losses)
        _height(left, found)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
        return {"barrier.png": png(figure)}


def _sweep_panel(axes: Axes, found: Sweep, column: int | None) -> None:
    values = np.array([[100 * at(one, column)[0] for one in row] for row in found.grid])  # (N, N), first by second
    half = (found.values[1] - found.values[0]) / 2
    low, high = found.values[0] - half, found.values[-1] + half
    # The first expert's coefficient goes to the right.
    image = axes.imshow(values.T, cmap="viridis", origin="lower", extent=(low, high, low, high), interpolation="nearest")
    axes.set_facecolor(NOTHING)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    marks = {name: found.corners[name] for name in DEFAULTS} | {"best": found.best(column)}
    said = []
    for name, ((l1, l2), measured) in marks.items():
        size = 11 if name == "best" else 6
        if low <= min(l1, l2) and max(l1, l2) <= high:
            axes.plot(l1, l2, MARKERS[name], ms=size, mfc="white", mec="black", mew=0.8, ls="none", label=_mark(name))
        said.append(f"{name} {100 * at(measured, column)[0]:.1f}")
    title = "mean over eval sets" if column is None else found.eval_sets[column]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_title(f"{short(title)} (%)\n{', '.join(said)}", fontsize=8)
    axes.set_xlabel(f"coefficient of {short(found.experts[0], 24)}")
    axes.set_ylabel(f"coefficient of {short(found.experts[1], 24)}")


def _mark(name: str) -> str:
    if name == "best":
        return "best"
    return f"{name} ({', '.join(f'{value:g}' for value in DEFAULTS[name])})"


def _lines(axes: Axes, found: Barrier, losses: bool) -> None:
    def of(column: int | None) -> list[float]:
        return [at(one, column)[1] if losses else 100 * at(one, column)[0] for one in found.line]

    for place, name in enumerate(found.eval_sets if len(found.eval_sets) > 1 else ()):
        colour = THIN[place % len(THIN)]
        line = "-" if place < len(THIN) else "--"
        axes.plot(found.points, of(place), line, color=colour, lw=0.9, alpha=0.8, label=short(name))
    whole = "mean over eval sets" if len(found.eval_sets) > 1 else short(found.eval_sets[0])
    axes.plot(found.points, of(None), color="black", lw=2, marker="o", ms=3.5, label=whole)
    if losses:
        axes.plot(found.points, chord(of(None)), color="black", lw=1, ls=":", label="between the ends' losses")
    axes.set_title("cross-entropy" if losses else "accuracy (%)")
    axes.set_xlabel(f"0 = {short(found.experts[0], 24)}, 1 = {short(found.experts[1], 24)}")


def _height(axes: Axes, found: Barrier) -> None:
    """An arrow where the line is highest above the chord, and its length in words."""
    straight = chord(found.losses)
    rises = [loss - between for loss, between in zip(found.losses, straight, strict=True)]
    title = f"cross-entropy; barrier {found.height:.3f}"
    if not math.isfinite(found.height):
        title = "cross-entropy; not finite everywhere"
    elif found.height > 0:
        top = int(np.argmax(rises))
        ends = ((found.points[top], straight[top]), (found.points[top], found.losses[top]))
        arrow = {"arrowstyle": "<->", "color": "#D55E00", "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", ends[1], ends[0], arrowprops=arrow, zorder=5)
    axes.set_title(title)
