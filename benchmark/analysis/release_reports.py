"""Findings about two releases as tables, JSON values and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes

from shiftproof.benchmark.analysis.canvas import Pictures, blank
from shiftproof.benchmark.analysis.releases import WITHOUT_MAPS, Curve, Line
from shiftproof.benchmark.analysis.tables import Table
from shiftproof.benchmark.boards.figures import COLOURS, STYLE, png


def barrier_tables(points: Sequence[float], lines: Sequence[Line]) -> list[Table]:
    """Loss at every point and the barrier, a row a method; then the accuracy."""
    header = ["loss", "barrier", *(f"{point:g}" for point in points)]
    losses = [[line.label, _number(line.height), *map(_number, line.losses)] for line in lines]
    accuracies = [[line.label, *(f"{value:.1%}" for value in line.accuracies)] for line in lines]
    return [Table(header, losses), Table(["accuracy", *header[2:]], accuracies)]


def barrier_json(stream: str, points: Sequence[float], lines: Sequence[Line]) -> dict[str, Any]:
    """Everything; null where a loss is not finite."""
    found = [
        {
            "method": line.label,
            "barrier": _null(line.height),
            "loss": [*map(_null, line.losses)],
            "accuracy": [*map(_null, line.accuracies)],
        }
        for line in lines
    ]
    return {"analysis": "rebasin", "stream": stream, "points": list(points), "lines": found}


def draw_barriers(stream: str, points: Sequence[float], lines: Sequence[Line]) -> Pictures:
    """Loss and accuracy on the way from the aligned source to the target, a line a method."""
    with style.context(["default", STYLE], after_reset=True):
        figure = blank(10.0, 4.6)
        left, right = figure.subplots(1, 2)
        for line, colour in _coloured(lines):
            dashes = "--" if line.label.endswith(WITHOUT_MAPS) else "-"
            shown = {"color": colour, "ls": dashes, "marker": "o", "ms": 3, "lw": 1.3}
            left.plot(points, line.losses, label=f"{line.label} ({_number(line.height)})", **shown)
            right.plot(points, [100 * value for value in line.accuracies], **shown)
        left.set_title("cross-entropy (barrier in brackets)")
        right.set_title("accuracy (%)")
        for axes in (left, right):
            axes.set_xlabel("0 = aligned old release, 1 = new release")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
        figure.suptitle(f"{stream}; residual maps are interpolated and rounded to the next permutation", fontsize=8)
        return {"rebasin.png": png(figure)}


def scale_tables(alphas: Sequence[float], groups: Sequence[str], curves: Sequence[Curve]) -> list[Table]:
    """A table a group: mean over folds at every scale."""
    header = [f"{alpha:g}" for alpha in alphas]
    return [
        Table([name, *header], [[curve.label, *(f"{value:.1%}" for value in means(curve, place))] for curve in curves])
        for place, name in enumerate(groups)
    ]


def scale_json(
    stream: str, alphas: Sequence[float], folds: Sequence[str], groups: Sequence[str], curves: Sequence[Curve]
) -> dict[str, Any]:
    """Everything: `accuracy[a][f][g]`."""
    found = [{"method": curve.label, "accuracy": curve.accuracies} for curve in curves]
    facts = {"analysis": "alpha", "stream": stream, "alphas": list(alphas), "folds": list(folds), "groups": list(groups)}
    return {**facts, "curves": found}


def draw_scales(stream: str, alphas: Sequence[float], groups: Sequence[str], curves: Sequence[Curve]) -> Pictures:
    """Gain over scale 0, a panel a group, as in Fig. 8.3; mean over folds."""
    with style.context(["default", STYLE], after_reset=True):
        figure = blank(10.0, 4.4)
        for place, (axes, name) in enumerate(zip(figure.subplots(1, len(groups), squeeze=False).flat, groups, strict=True)):
            _gains(axes, place, alphas, curves)
            axes.set_title(f"{name}: accuracy minus that at scale 0 (points)")
            handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=7)
        told = "mean over folds; at scale 0 a method has the new release and the head as it carries it over"
        figure.suptitle(f"{stream}, {told}", fontsize=8)
        return {"alpha.png": png(figure)}


def means(curve: Curve, group: int) -> list[float]:
    """Mean over folds of a group's accuracy, at every scale."""
    return [sum(fold[group] for fold in folds) / len(folds) for folds in curve.accuracies]


def _gains(axes: Axes, group: int, alphas: Sequence[float], curves: Sequence[Curve]) -> None:
    axes.axhline(0, color="#999999", lw=0.8)
    for curve, colour in zip(curves, _cycle(len(curves)), strict=True):
        values = means(curve, group)
        axes.plot(alphas, [100 * (value - values[0]) for value in values], color=colour, lw=1.3, label=curve.label)
    axes.set_xlabel("scale of the task vector")


def _coloured(lines: Sequence[Line]) -> list[tuple[Line, str]]:
    """A method and its line without maps have one colour."""
    bases = list(dict.fromkeys(line.label.removesuffix(WITHOUT_MAPS) for line in lines))
    colours = dict(zip(bases, _cycle(len(bases)), strict=True))
    return [(line, colours[line.label.removesuffix(WITHOUT_MAPS)]) for line in lines]


def _cycle(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
