"""`shiftproof leaderboard build`, `check` and `show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftproof.benchmark.cli.console import catalogue, console
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import did_you_mean

if TYPE_CHECKING:
    from shiftproof.benchmark.records import RunRecord

FORMATS = ("table", "csv", "markdown", "latex")

app = typer.Typer(help="Build, check and show leaderboards.", rich_markup_mode=None)
BoardFile = Annotated[Path, typer.Argument(metavar="FILE", help="A board.")]


@app.command()
def build(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="Output folder of a run, or a folder of records.")],
    file: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The board to write; pictures go beside it.")],
) -> None:
    """Build a board from records; twice from the same records gives the same bytes."""
    from shiftproof.benchmark.records import read_records

    if not runs.is_dir():
        raise InputError(f"expected a folder with records, got {runs}, which is none; name the --out folder of a run")
    folder = runs / "records" if (runs / "records").is_dir() else runs
    board, files = write_board(file.stem, read_records(folder), _metrics(), file)
    print_board(board)
    typer.echo("".join(f"wrote: {written}\n" for written in files), nl=False)


@app.command()
def check(
    file: BoardFile,
    records: Annotated[
        Path | None, typer.Option(help="Folder of its records; by default 'records' or 'runs/NAME' beside it.")
    ] = None,
) -> None:
    """Compute every number of a board again from its records; exit with 2 if one differs."""
    from shiftproof.benchmark.boards.leaderboard import check_board, read_board, record_texts

    board = read_board(file)
    texts = record_texts(records or _records_beside(file))
    problems = check_board(board, texts, _metrics())
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    if problems:
        raise typer.Exit(2)
    typer.echo(f"{file.name}: {len(texts)} records, every number agrees")


@app.command()
def show(
    file: BoardFile, format: Annotated[str, typer.Option("--format", help="table, csv, markdown or latex.")] = "table"
) -> None:
    """Print a board."""
    from shiftproof.benchmark.boards.export import render
    from shiftproof.benchmark.boards.leaderboard import read_board

    if format not in FORMATS:
        raise InputError(f"expected --format as one of {', '.join(FORMATS)}, got {format!r}{did_you_mean(format, FORMATS)}")
    board = read_board(file)
    if format == "table":
        print_board(board)
    else:
        typer.echo(render(board, format), nl=False)


def write_board(
    name: str, records: Sequence[RunRecord], metrics: Sequence[MetricSpec], file: Path
) -> tuple[dict[str, Any], list[Path]]:
    """Build a board, write it and its pictures; the board's file comes first in the list."""
    from shiftproof.benchmark.boards.figures import draw_board
    from shiftproof.benchmark.boards.leaderboard import board_json, build_board
    from shiftproof.benchmark.records import write_atomically

    board = build_board(name, records, metrics)
    write_atomically(file, board_json(board))
    return board, [file, *draw_board(board, records, file.parent)]


def print_board(board: Mapping[str, Any]) -> None:
    """Print a board as tables."""
    from shiftproof.benchmark.boards.export import table

    out = console()
    for made in table(board):
        out.print(made)


def _metrics() -> list[MetricSpec]:
    """Every installed metric; only plugins that have some are imported."""
    from shiftproof.benchmark.registry.lookup import load_registry

    return list(load_registry(catalogue().with_hook(["shiftproof_metrics"])).metrics.values())


def _records_beside(file: Path) -> Path:
    folders = [file.parent / "records", file.parent / "runs" / file.stem]
    for folder in folders:
        if folder.is_dir():
            return folder
    looked = " or ".join(str(folder) for folder in folders)
    raise InputError(f"expected the records of {file.name} in {looked}, got no such folder; name it with --records")
