"""What the pictures of analyses share: a blank figure, its panels, and labels."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shiftproof.benchmark.boards.figures import CAPTION, DPI, STYLE

PLAIN: dict[str, Any] = {**STYLE, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}
"""Style of heat maps."""

Pictures = dict[str, bytes]
"""Name of a file to the PNG that is to be written there."""

NOTHING = "#e6e6e6"  # colour of cells without a value
LENGTH = 34  # characters of a label


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels_of(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels in rows of at most `columns`; width and height are those of a panel."""
    across = min(count, columns)
    down = math.ceil(count / columns)
    figure = blank(max(across * width, 4.0), down * height + 0.5)
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in every[count:]:
        unused.set_axis_off()
    return figure, every[:count]


def footnote(figure: Figure, text: str) -> None:
    """A line of small print."""
    figure.supxlabel(text, **CAPTION)


def short(name: str, length: int = LENGTH) -> str:
    """A name whose first parts give way, since those are what names of tensors share, but for parts with a number in it.

    >>> short("visual.transformer.resblocks.0.attn.out_proj.weight", 34)
    '...resblocks.0.attn.out_proj.weight'
    >>> short("encoder.layers.encoder_layer_0.self_attention.out_proj", 34)
    '...encoder_layer_0...out_proj'
    """
    kept = dict(enumerate(name.split(".")))
    for place, part in list(kept.items())[:-1]:
        if len(".".join(kept.values())) <= length:
            break
        if not any(map(str.isdigit, part)):
            del kept[place]
    if len(".".join(kept.values())) > length:
        return f"...{name[-length:]}"
    return "".join(("" if not place else "." if place - 1 in kept else "...") + part for place, part in kept.items())
