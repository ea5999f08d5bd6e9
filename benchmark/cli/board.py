"""`shiftproof leaderboard build`, `check` and `show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftproof.benchmark.cli.console import catalogue, console, counted
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.names import did_you_mean
from shiftproof.benchmark.paths import is_folder

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
    from shiftproof.benchmark.records import read_records, records_folder

    _check_target(file)
    if not is_folder(runs):
        raise InputError(f"expected a folder with records, got {runs}, which is none; name the --out folder of a run")
    folder = records_folder(runs)
    board, files = write_board(file.stem, read_records(folder), _metrics(), file, folder)
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
    from shiftproof.benchmark.records import records_folder

    board = read_board(file)
    folder = records or _records_beside(file)
    texts = record_texts(folder)
    problems = check_board(board, texts, _metrics(), where=str(file), folder=records_folder(folder))
    if problems:
        raise InputError(problems[0] + (f"; and {len(problems) - 1} more" if len(problems) > 1 else ""))
    typer.echo(f"{file}: {counted(len(texts), 'record')}, every number agrees")


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
    name: str, records: Sequence[RunRecord], metrics: Sequence[MetricSpec], file: Path, folder: Path | None = None
) -> tuple[dict[str, Any], list[Path]]:
    """Build a board, write it and its pictures or nothing; the board's file comes first in the list.

    Args:
        name: Of the board.
        records: Finished and failed ones.
        metrics: Columns.
        file: Of the board.
        folder: That the records were read from, for errors to name their files.
    """
    from shiftproof.benchmark.boards.figures import draw_board
    from shiftproof.benchmark.boards.leaderboard import board_json, build_board
    from shiftproof.benchmark.records import write_together

    board = build_board(name, records, metrics, folder)
    files: dict[Path, str | bytes] = {file: board_json(board), **draw_board(board, records, file.parent)}
    try:
        write_together(files)
    except OutputError:
        print_board(board)  # a run may have taken hours: what came out is shown though it cannot be kept
        raise
    return board, list(files)


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


def _check_target(file: Path) -> None:
    """Before the work: the file must be one that a board can be written to."""
    if is_folder(file):  # an empty name, too
        raise InputError(f"expected -o as a board's file, got the folder {file}; name a .json file in it")
    if file.suffix != ".json":
        raise InputError(f"expected -o as a file that ends in .json, got {file}; `leaderboard show --format` has other formats")


def _records_beside(file: Path) -> Path:
    folders = [file.parent / "records", file.parent / "runs" / file.stem]
    for folder in folders:
        if is_folder(folder):
            return folder
    looked = " or ".join(str(folder) for folder in folders)
    raise InputError(f"expected the records of {file} in {looked}, got no such folder; name it with --records")
