"""What the commands share: where they print to, and the catalogue with a word about broken plugins."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table

from shiftproof.benchmark.catalogue import Catalogue, read_catalogue

PIPE_WIDTH = 220  # columns where the reader is a file or another program: no name is cut in two


def console() -> Console:
    """Standard output. Names and ranges such as [0, 1) are printed as they are."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def table(*columns: str, title: str = "") -> Table:
    """An empty table; names, in the first column, are never broken."""
    made = Table(title=title or None, title_justify="left")
    for position, column in enumerate(columns):
        made.add_column(column, no_wrap=position == 0)
    return made


def catalogue() -> Catalogue:
    """The catalogue; says on standard error which plugins did not load."""
    read = read_catalogue()
    if read.broken:
        typer.echo(f"broken: {', '.join(sorted(read.broken))}; `shiftproof plugins` says why", err=True)
    return read
