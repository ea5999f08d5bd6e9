"""Pictures of a board: worst group against average, and accuracy over the task sequence."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from shiftproof.benchmark.boards.curves import task_curves
from shiftproof.benchmark.boards.export import display_name, printable
from shiftproof.benchmark.boards.labels import crosses, place_labels, spread
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import RunRecord

Block = Mapping[str, Any]
Array = NDArray[np.float64]

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart in any kind of colour vision; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
DPI = 200
LEAST_SPAN = 4.0  # percentage points on an axis, so that noise does not look like a difference
NAME_LENGTH = 48
STEM_LENGTH = 120  # file systems end at 255
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a label may hold a dollar sign
}
CAPTION: dict[str, Any] = {"fontsize": 6.5, "color": "#555555", "x": 0.01, "ha": "left"}


class Look(NamedTuple):
    """How a strategy is drawn, the same in every picture of a section."""

    name: str
    colour: str
    marker: str
    dashes: Any
    hollow: bool


def draw_board(board: Block, records: Sequence[RunRecord], folder: Path) -> dict[Path, bytes]:
    """Draw each section of a board as PNG pictures, the same to the byte for the same board and matplotlib.

    Args:
        board: As built or read.
        records: Those of the board; the accuracy over the task sequence is computed from their counts.
        folder: Where the files are to go.

    Returns:
        What each file is to hold: `<board>-<section>-worst-average.png`, and `-sequence.png` where the order of tasks means
        something.

    Raises:
        InputError: If a record is missing.
    """
    by_id = {record.run_id: record for record in records}
    missing = sorted(set(board["records"]) - set(by_id))
    if missing:
        raise InputError(f"expected all {len(board['records'])} records of the board to draw it, got none of run {missing[0]}")
    board = printable(board)
    # From matplotlib's defaults, whatever a matplotlibrc says.
    with style.context(["default", STYLE], after_reset=True):
        stems = _stems([f"{board['name']} {section['title']}" for section in board["sections"]])
        return {
            folder / f"{stem}-{kind}.png": png(figure)
            for stem, section in zip(stems, board["sections"], strict=True)
            for kind, figure in _draw(section, by_id)
        }


def _stems(titles: Sequence[str]) -> list[str]:
    """File names from titles, told apart by a number where they come out the same."""
    stems = [re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-.")[:STEM_LENGTH] for title in titles]
    return [f"{stem}-{place}" if stems.count(stem) > 1 else stem for place, stem in enumerate(stems, 1)]


def _draw(section: Block, records: Mapping[str, RunRecord]) -> Iterator[tuple[str, Figure]]:
    rows = [row for row in section["rows"] if row["run_ids"]]
    looks = [_look(place, row) for place, row in enumerate(rows)]
    pairs = [(row["metrics"], look) for row, look in zip(rows, looks, strict=True)]
    points = [(metrics["average"], metrics["worst"], look) for metrics, look in pairs if {"average", "worst"} <= metrics.keys()]
    points = [(average, worst, look) for average, worst, look in points if None not in (average["mean"], worst["mean"])]
    if points:
        yield "worst-average", _scatter(section, points)
    if rows and section["ordered"]:
        curves = [task_curves([records[run_id] for run_id in row["run_ids"]]) for row in rows]
        yield "sequence", _sequence(section, curves, looks)


def _look(place: int, row: Block) -> Look:
    turn, colour = divmod(place, len(COLOURS))
    hollow = bool({"group labels", "bias knowledge", "upper bound"} & set(row["flags"]))
    name = textwrap.shorten(display_name(row), NAME_LENGTH, placeholder=" ...")
    return Look(name, COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)], DASHES[turn % len(DASHES)], hollow)


def png(figure: Figure) -> bytes:
    """A figure as a file of that format."""
    buffer = io.BytesIO()
    # The version of matplotlib, which it would write into the file, is no part of the picture.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _scatter(section: Block, points: Sequence[tuple[Block, Block, Look]]) -> Figure:
    figure = Figure(figsize=(7.0, 5.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    means = np.array([[100 * average["mean"], 100 * worst["mean"]] for average, worst, _ in points])  # (N, 2)
    ends = np.array([[_ends(average), _ends(worst)] for average, worst, _ in points])  # (N, 2, 2)
    bars = np.abs(ends - means[..., None])  # (N, 2, 2), to the left and right, down and up
    for (x, y), (dx, dy), (_, _, look) in zip(means, bars, points, strict=True):
        axes.errorbar(x, y, xerr=dx[:, None], yerr=dy[:, None], color=look.colour, elinewidth=0.7, alpha=0.55, zorder=2)
        face = "white" if look.hollow else look.colour
        axes.plot(x, y, look.marker, color=look.colour, mfc=face, ms=5, zorder=3, clip_on=False)
    axes.set_xlabel("average accuracy (%)")
    axes.set_ylabel("worst-group accuracy (%)")
    axes.set_title(_wrapped(section["title"], 90))
    axes.margins(0.06)
    for (low, high), set_limits in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        span = max(high - low, LEAST_SPAN)
        least = float(np.clip((low + high - span) / 2, 0, max(100 - span, 0)))
        set_limits(least, min(least + span, 100))
    figure.supxlabel(_caption(points), **CAPTION)
    figure.draw_without_rendering()
    _name_points(axes, means, ends, [look for _, _, look in points])
    return figure


def _ends(summary: Block) -> tuple[float, float]:
    """Of the bar, in percent; an interval may be wider than what an accuracy can be."""
    interval = _interval(summary)
    half = (interval["high"] - interval["low"]) / 2 if interval else 0.0
    return 100 * max(summary["mean"] - half, 0.0), 100 * min(summary["mean"] + half, 1.0)


def _interval(summary: Block) -> Block | None:
    """The row's own interval; the pooled one where there are too few seeds for it."""
    interval: Block | None = summary["interval"] or summary["pooled_interval"]
    return interval


def _caption(points: Sequence[tuple[Block, Block, Look]]) -> str:
    methods = sorted({interval["method"] for _, worst, _ in points if (interval := _interval(worst))})
    bars = [f"Bars: interval of the mean over seeds ({'; '.join(methods)})."] if methods else []
    if methods and any(_interval(worst) is None for _, worst, _ in points):
        bars.append("Without one: too few seeds, and not ranked.")
    return _wrapped(" ".join([*bars, *_legend([look for _, _, look in points])]), 120)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, max_lines=3, placeholder=" ...")


def _legend(looks: Sequence[Look]) -> list[str]:
    return (
        ["Hollow: uses group labels, knowledge of the bias, or the held-out domain."]
        if any(look.hollow for look in looks)
        else []
    )


def _name_points(axes: Axes, means: Array, ends: Array, looks: Sequence[Look]) -> None:
    """Write each name near its point, with a thin line where it stands apart."""
    unit = DPI / 72
    axes.autoscale(False)
    halo = [withStroke(linewidth=1.5, foreground="white")]
    texts = [
        axes.text(0, 0, look.name, fontsize=7, color=look.colour, zorder=5, path_effects=halo, in_layout=False)
        for look in looks
    ]
    extents = [text.get_window_extent() for text in texts]
    sizes = np.array([[extent.width + 2 * unit, extent.height + 1 * unit] for extent in extents])
    points, low, high = (axes.transData.transform(at) for at in (means, ends[..., 0], ends[..., 1]))  # (N, 2) each
    corners = place_labels(points, sizes, crosses(points, low, high, unit), np.array(axes.bbox.extents), unit)
    for text, corner, size, point, look in zip(texts, corners, sizes, points, looks, strict=True):
        x, y = axes.transData.inverted().transform(corner + unit * np.array([1.0, 0.5]))
        text.set_position((float(x), float(y)))
        text.set_verticalalignment("bottom")
        nearest = np.clip(point, corner, corner + size)
        if np.hypot(*(nearest - point)) > 9 * unit:
            line = axes.transData.inverted().transform(np.stack([point, nearest]))
            axes.plot(*line.T, color=look.colour, lw=0.4, alpha=0.7, zorder=1)


def _sequence(section: Block, curves: Sequence[Array], looks: Sequence[Look]) -> Figure:
    figure = Figure(figsize=(9.6, 4.6), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    length = max(len(curve) for curve in curves)
    panels = figure.subplots(1, 2)
    for panel, title, column in zip(panels, ("average accuracy", "worst-group accuracy"), (0, 1), strict=True):
        lines = [100 * curve[:, column] for curve in curves]
        for line, look in zip(lines, looks, strict=True):
            _line(panel, line, look, length)
        panel.set_title(f"{title} over the tasks seen so far (%)")
        panel.set_xlabel("tasks learned")
        panel.set_xticks(range(1, length + 1))
        panel.set_xlim(0.8, length + 0.15)
    figure.suptitle(_wrapped(section["title"], 125), x=0.01, ha="left", fontsize=9)
    union = ["Dots without markers: learned all tasks at once."] if any(len(curve) < length for curve in curves) else []
    figure.supxlabel(" ".join(["Mean over seeds.", *union, *_legend(looks)]), **CAPTION)
    figure.draw_without_rendering()
    for panel, column in zip(panels, (0, 1), strict=True):
        _name_lines(panel, [100 * float(curve[-1, column]) for curve in curves], looks, length)
    return figure


def _line(panel: Axes, line: Array, look: Look, length: int) -> None:
    if len(line) < length:  # learned all tasks at once: one value, drawn across
        panel.plot([1, length], [line[-1]] * 2, color=look.colour, lw=1.0, ls=":", zorder=2)
        return
    face = "white" if look.hollow else look.colour
    place = range(1, length + 1)
    panel.plot(place, line, color=look.colour, ls=look.dashes, lw=1.1, marker=look.marker, ms=3, mfc=face, mew=0.8, zorder=3)


def _name_lines(panel: Axes, ends: Sequence[float], looks: Sequence[Look], length: int) -> None:
    """Write each name at the end of its line, moved up or down as far as it takes."""
    low, high = panel.get_ylim()
    height = panel.get_window_extent().height / DPI * 72  # in points
    heights = spread(np.array(ends), 7.6 / height * (high - low), low, high)
    for end, at, look in zip(ends, heights, looks, strict=True):
        panel.annotate(
            look.name,
            (length, end),
            (length + 0.07 * length, at),
            fontsize=6.5,
            color=look.colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": look.colour, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)},
        )
