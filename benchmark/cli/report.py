"""What `shiftproof run` prints: the plan, the progress, and what came out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from shiftproof.benchmark.cli.board import print_board, write_board
from shiftproof.benchmark.cli.console import counted, print_table

if TYPE_CHECKING:
    from shiftproof.benchmark.registry.lookup import Registry
    from shiftproof.benchmark.running.matrix import Outcome, Plan, RunOptions, Step

HOUR = 3600.0  # seconds of cells by which the time that is left is estimated


def print_plan(plan: Plan, states: Sequence[str], rerun: bool) -> None:
    """The table of cells with their states, and of what is skipped with its reason."""
    rows = []
    for cell, state in zip(plan.cells, states, strict=True):
        request = cell.request
        shown = f"to run again ({state})" if rerun and state != "to run" else state
        rows.append([request.label, request.stream, request.fold, str(request.seed), shown])
    rows += [[skipped.strategy, skipped.stream, "-", "-", f"skipped: {skipped.reason}"] for skipped in plan.skipped]
    print_table(["strategy", "stream", "fold", "seed", "state"], rows)
    finished = f"{list(states).count('finished')} finished"
    typer.echo(f"{counted(len(plan.cells), 'cell')}, {finished}, {counted(len(plan.skipped), 'pair')} skipped")


def check_neighbours(plan: Plan, out: Path) -> None:
    """Refuse to start where no board could be built at the end.

    Raises:
        InputError: If a record in the folder is damaged, or of another version, split or data of a stream of the plan.
    """
    from shiftproof.benchmark.boards.sections import refuse_mixed_streams
    from shiftproof.benchmark.records import RecordStore

    lying = [record.identity for record in RecordStore(out).all() if not record.protocol["custom"]]
    refuse_mixed_streams([*lying, *(cell.identity for cell in plan.cells if not cell.request.custom)])


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[Step], None] | None]:
    """A progress bar with an estimate on standard error; nothing where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=HOUR) as bar:
        task = bar.add_task("cells", total=None)

        def advance(step: Step) -> None:
            said = "cells"
            if step.cell is not None:
                request = step.cell.request
                said = f"{request.label} on {request.stream}, seed {request.seed}: {step.status}"
            bar.update(task, completed=step.done, total=step.total, description=said)

        yield advance


def report(plan: Plan, registry: Registry, options: RunOptions, outcome: Outcome) -> None:
    """Board, pictures, tables, failures; ends with the exit code."""
    from shiftproof.benchmark.records import RecordStore

    for skipped in plan.skipped:
        typer.echo(f"skipped: {skipped.strategy} on {skipped.stream}: {skipped.reason}", err=True)
    records = RecordStore(options.out).all()
    if records:
        board, files = write_board(plan.suite.name, records, list(registry.metrics.values()), options.out / "board.json")
        print_board(board)
        typer.echo(f"records: {options.out / 'records'}\nboard: {files[0]}")
        typer.echo("".join(f"picture: {file}\n" for file in files[1:]), nl=False)
    kept = f"{outcome.reused} kept, {len(outcome.failed)} failed, {len(outcome.lost)} lost"
    typer.echo(f"{counted(outcome.finished, 'cell')} run, {kept}")
    _report_failures(outcome)
    if outcome.contract_violated:
        raise typer.Exit(2)
    if outcome.failed or outcome.lost:
        raise typer.Exit(1)


def _report_failures(outcome: Outcome) -> None:
    """One line for each cell that has no result."""
    for record in outcome.failed:
        error, cell = record.error or {}, record.identity
        where = f"{record.label} on {cell['stream']}, fold {cell['fold']}, seed {cell['seed']}"
        typer.echo(f"failed: {where}: {error.get('type')}: {error.get('message')} ({error.get('where')})", err=True)
    for lost in outcome.lost:
        request = lost.request
        where = f"{request.label} on {request.stream}, fold {request.fold}, seed {request.seed}"
        typer.echo(f"lost: {where}: its worker died; a machine out of memory kills workers, try fewer --jobs", err=True)
