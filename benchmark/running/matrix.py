"""Plan the cells of a suite minus the finished ones, and hand them to an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from shiftproof.benchmark import config
from shiftproof.benchmark.context import CHECKPOINT_SECONDS
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.recipes import BaseRecipe, Recipe
from shiftproof.benchmark.records import RecordStore, RunRecord, RunRequest
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.bases import check_base_file
from shiftproof.benchmark.running.cells import Cell, build_stream, make_cell, obstacle
from shiftproof.benchmark.running.executors import JobResult
from shiftproof.benchmark.running.jobs import Job
from shiftproof.benchmark.streams import Stream

STREAM_SCOPES = ("stream", "recipe", "base")
Overrides = Mapping[str, Sequence[tuple[str, str]]]
ATTEMPTS = 2  # a failed cell is tried again once per code identity


@dataclass(frozen=True)
class Skipped:
    """A pair that cannot be combined, and why."""

    strategy: str
    stream: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The cells of a suite."""

    suite: SuiteSpec
    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class RunOptions:
    """How a plan is carried out.

    Attributes:
        entry_points: Plugins a worker loads; None for all.
        files: Loose plugin files a worker loads.
    """

    out: Path
    executor: str = "process"
    jobs: int = 1
    device: str = "cpu"
    data_root: str | None = None
    retry_failed: bool = False
    rerun: bool = False
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    command: str = ""
    entry_points: tuple[str, ...] | None = None
    files: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a plan."""

    finished: int = 0
    reused: int = 0
    failed: list[RunRecord] = field(default_factory=list)
    lost: list[Cell] = field(default_factory=list)

    @property
    def contract_violated(self) -> bool:
        """True where a strategy did what it had not declared: wrong input rather than a failed run."""
        return any(record.error is not None and record.error["type"] == "ContractError" for record in self.failed)


@dataclass(frozen=True)
class Step:
    """Told before the first cell, without one, and after every cell; for progress bars."""

    done: int
    total: int
    cell: Cell | None = None
    status: str = ""


def plan(
    registry: Registry, suite: SuiteSpec, overrides: Sequence[str] = (), device: str = "cpu", data_root: str | None = None
) -> Plan:
    """Every cell of the suite, and what is skipped with its reason.

    Args:
        overrides: "scope.key=value" from the command line, on top of the suite's own. Where they change stream, recipe or
            base the run is custom, and so it is where those of a suite do that gives the recipe no name.

    Raises:
        InputError: If a name, a scope or a value is wrong.
    """
    own, more = (_scoped(registry, suite, items) for items in (suite.overrides, overrides))
    given = {scope: [*own[scope], *more[scope]] for scope in own}
    standard = own if suite.recipe else _scoped(registry, suite, ())
    cells: list[Cell] = []
    skipped: list[Skipped] = []
    for name in suite.streams:
        common = _common(name, suite, given)
        stream = build_stream(registry, common, data_root)
        check_base_file(registry, stream)
        if any(given[scope] != standard[scope] for scope in STREAM_SCOPES):
            usual = build_stream(registry, _common(name, suite, standard), data_root)
            common = replace(common, custom=_facts(stream) != _facts(usual))
        for label in suite.strategies:
            spec, preset, _ = registry.strategy(label)
            reason = obstacle(registry, spec, stream)
            if reason:
                skipped.append(Skipped(label, name, reason))
                continue
            for request in _requests(common, stream, spec.name, preset, given[label], suite.seeds):
                cells.append(make_cell(registry, request, stream, device))
    return Plan(suite, tuple(cells), tuple(skipped))


def states(plan: Plan, out: Path) -> list[str]:
    """For each cell: finished, failed, or to run."""
    store = RecordStore(out)
    return [record.status if (record := store.read(cell.run_id)) is not None else "to run" for cell in plan.cells]


def run_plan(plan: Plan, registry: Registry, options: RunOptions, progress: Callable[[Step], None] | None = None) -> Outcome:
    """Run what is not finished yet. Kill it anywhere and call it again: nothing finished is run twice.

    Raises:
        InputError: If the output folder cannot be written, a record in it is damaged, or there is to be no worker.
    """
    if options.jobs < 1:
        raise InputError(f"expected 1 or more jobs, got {options.jobs}")
    store = RecordStore(options.out)
    by_id = {cell.run_id: cell for cell in plan.cells}
    outcome = Outcome()
    waiting: list[Job] = []
    for cell in by_id.values():  # two labels may stand for one cell
        stored = store.read(cell.run_id)
        failed = stored is not None and stored.status == "failed"
        if stored is None or options.rerun or (failed and (options.retry_failed or stored.attempts < ATTEMPTS)):
            waiting.append(_job(cell, options, stored.attempts if stored is not None and failed else 0))
        elif stored.status == "failed":
            outcome.failed.append(stored)
        else:
            outcome.reused += 1
    if progress is not None and waiting:
        progress(Step(0, len(waiting)))
    executor = registry.executor(options.executor).build()
    for done, result in enumerate(_results(executor.run, waiting, options.jobs), start=1):
        cell = by_id[result.run_id]
        _tally(outcome, result, cell, store)
        if progress is not None:
            progress(Step(done, len(waiting), cell, result.status))
    return outcome


def _results(
    run: Callable[[Sequence[Job], int], Iterator[JobResult]], jobs: Sequence[Job], workers: int
) -> Iterator[JobResult]:
    """Results of all jobs; cells that another process holds are asked for again at the end, and waited for."""
    by_id = {job.run_id: job for job in jobs}
    busy = []
    for result in run(jobs, workers):
        if result.status == "busy":
            busy.append(replace(by_id[result.run_id], wait=True))
        else:
            yield result
    if busy:
        yield from run(busy, workers)


def _tally(outcome: Outcome, result: JobResult, cell: Cell, store: RecordStore) -> None:
    if result.status == "finished":
        outcome.finished += 1
        return
    record = store.read(result.run_id) if result.status == "failed" else None
    if record is None:
        outcome.lost.append(cell)
    else:
        outcome.failed.append(record)


def _job(cell: Cell, options: RunOptions, attempts: int) -> Job:
    return Job(
        cell.request,
        cell.run_id,
        str(options.out),
        options.device,
        options.command,
        options.checkpoint_seconds,
        options.data_root,
        options.entry_points,
        options.files,
        rerun=options.rerun,
        attempts=attempts,
    )


def _common(stream: str, suite: SuiteSpec, given: Overrides) -> RunRequest:
    """What all requests of a suite on one stream have in common."""
    knobs, recipe, base = (tuple(given[scope]) for scope in STREAM_SCOPES)
    return RunRequest("", stream, 0, knobs=knobs, recipe=recipe, base=base, recipe_name=suite.recipe)


def _facts(stream: Stream) -> tuple[object, ...]:
    """What tells a custom stream from the standard one."""
    return stream.data_sha256, stream.split_sha256, stream.recipe, stream.base


def _requests(
    common: RunRequest, stream: Stream, strategy: str, preset: str, pairs: Sequence[tuple[str, str]], seeds: Sequence[int]
) -> Iterator[RunRequest]:
    for fold in stream.folds:
        for seed in seeds:
            yield replace(common, strategy=strategy, preset=preset, config=tuple(pairs), fold=fold.name, seed=seed)


def _scoped(registry: Registry, suite: SuiteSpec, overrides: Sequence[str]) -> Overrides:
    owners: dict[str, list[str]] = {"recipe": _names(Recipe), "base": _names(BaseRecipe), "stream": []}
    for name in suite.streams:
        owners["stream"] += _names(registry.stream(name).config)
    for label in suite.strategies:
        spec, _, _ = registry.strategy(label)
        owners[label] = _names(spec.config)
    return config.split_overrides(overrides, owners)


def _names(kind: type) -> list[str]:
    return [one.name for one in fields(kind)]
