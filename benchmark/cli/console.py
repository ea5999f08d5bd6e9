"""What the commands share: tables of text, and the catalogue with a word about broken plugins."""

from __future__ import annotations

import gc
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING

import typer

from shiftproof.benchmark.errors import Terminated
from shiftproof.benchmark.registry.catalogue import Catalogue, read_catalogue

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 220  # columns of a board where the reader is a file or another program
NARROWEST = 16  # columns that a cell of text is given at least
GAP = 2


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Around imports of torch: the garbage collector looks at all that they make again and again, and all of it stays."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def catalogue() -> Catalogue:
    """The catalogue; says on standard error which plugins did not load."""
    read = read_catalogue()
    if read.broken:
        typer.echo(f"broken: {', '.join(sorted(read.broken))}; `shiftproof plugins` says why", err=True)
    return read


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, broken into lines on a terminal and left whole for files and pipes."""
    typer.echo(layout(header, rows, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))


def layout(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> str:
    """Aligned columns under a header; rich has finer tables and takes a fifth of the time in which `list` must answer.

    Args:
        width: Columns to stay within by breaking cells other than the first of a row; None for no limit.

    >>> print(layout(["name", "what"], [["er", "replay from a reservoir"]], 22))
    name  what
    ----  ----------------
    er    replay from a
          reservoir
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    while width is not None and sum(widths) + GAP * (len(widths) - 1) > width and max(widths[1:], default=0) > NARROWEST:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    lines = [_line(header, widths), _line(["-" * limit for limit in widths], widths)]
    for row in rows:
        cells = [textwrap.wrap(cell, limit) or [""] for cell, limit in zip(row, widths, strict=True)]
        lines += [_line(parts, widths) for parts in zip_longest(*cells, fillvalue="")]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return (" " * GAP).join(cell.ljust(limit) for cell, limit in zip(cells, widths, strict=True)).rstrip()


def counted(count: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "cell"), counted(2, "cell")
    ('1 cell', '2 cells')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated` in the main thread; otherwise the process would end where it stands."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def console() -> Console:
    """Standard output for boards. Names and ranges such as [0, 1) are printed as they are."""
    from rich.console import Console

    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
