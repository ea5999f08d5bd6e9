"""How alike two releases become by an alignment, layer by layer, as a picture and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes

from shiftproof.benchmark.analysis.canvas import blank, footnote, short
from shiftproof.benchmark.boards.figures import STYLE, png
from shiftproof.benchmark.records import write_together
from shiftproof.benchmark.transporting.diagnostics import WHOLE, LayerMatch, Moved

ROW = 0.17  # inches a layer or permutation


def write_alignment(layers: Sequence[LayerMatch], moved: Sequence[Moved], folder: Path) -> list[Path]:
    """`alignment.json` and `alignment.png`, or nothing."""
    text = json.dumps(alignment_json(layers, moved), indent=1, allow_nan=False) + "\n"
    files: dict[Path, str | bytes] = {folder / "alignment.json": text, folder / "alignment.png": draw_alignment(layers, moved)}
    write_together(files)
    return list(files)


def alignment_json(layers: Sequence[LayerMatch], moved: Sequence[Moved]) -> dict[str, Any]:
    """Everything."""
    return {
        "analysis": "alignment",
        "layers": [asdict(one) for one in layers],
        "permutations": [asdict(one) for one in moved],
    }


def draw_alignment(layers: Sequence[LayerMatch], moved: Sequence[Moved]) -> bytes:
    """Similarity of each layer as it is, aligned and at random, beside the share of units that each permutation moves."""
    with style.context(["default", STYLE], after_reset=True):
        figure = blank(10.0, 1.6 + ROW * max(len(layers), len(moved)))
        left, right = figure.subplots(1, 2)
        _similarities(left, layers)
        _shares(right, moved)
        footnote(figure, "Layers in the order of depth. A random permutation of n units moves 1 - 1/n of them in the mean.")
        return png(figure)


def _similarities(axes: Axes, layers: Sequence[LayerMatch]) -> None:
    rows = range(len(layers))
    axes.plot([one.random for one in layers], rows, "x", color="#999999", ms=4, label="at random")
    axes.plot([one.before for one in layers], rows, "o", color="#0072B2", ms=4, label="as they are")
    axes.plot([one.matched for one in layers], rows, "D", color="#D55E00", ms=4, label="aligned")
    axes.set_yticks(rows, [short(one.layer) if one.layer != WHOLE else "all layers" for one in layers], fontsize=6)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("cosine similarity of the releases")
    axes.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def _shares(axes: Axes, moved: Sequence[Moved]) -> None:
    rows = range(len(moved))
    axes.barh(rows, [100 * one.units for one in moved], height=0.7, color="#56B4E9", label="units")
    attentions = [(row, 100 * one.heads) for row, one in zip(rows, moved, strict=True) if one.heads is not None]
    if attentions:
        places, heads = zip(*attentions, strict=True)
        axes.plot(heads, places, "D", color="#000000", ms=4, label="attention heads")
    axes.set_yticks(rows, [short(one.permutation) for one in moved], fontsize=6)
    axes.set_ylim(len(moved) - 0.5, -0.5)
    axes.set_xlim(0, 105)
    axes.set_xlabel("moved (%)")
    axes.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
