"""`shiftproof run`: plan a suite, run what is missing, print the board."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shiftproof.benchmark.cli.console import catalogue, ended_by_sigterm
from shiftproof.benchmark.cli.facts import suite_of
from shiftproof.benchmark.cli.report import check_neighbours, print_plan, report, show_progress
from shiftproof.benchmark.contracts import EXPERT_TRAINER, SuiteSpec
from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.names import KINDS, did_you_mean, problems_hint, unknown
from shiftproof.benchmark.registry.catalogue import Catalogue
from shiftproof.benchmark.suites import LARGEST_SEED, check_seeds, read_suite

if TYPE_CHECKING:
    from shiftproof.benchmark.registry.lookup import Registry
    from shiftproof.benchmark.running.matrix import Plan

DEVICES = ("auto", "cpu", "cuda")
NAMED = 3  # reasons that an error lists at most

# Plugins with one of these hooks take part in every run, whatever its strategies and streams are.
ALWAYS = (
    "shiftproof_metrics",
    "shiftproof_backbones",
    "shiftproof_run_started",
    "shiftproof_experience_learned",
    "shiftproof_run_finished",
)

PluginFiles = Annotated[list[Path], typer.Option("--plugin", metavar="FILE.py", help="A loose plugin file; may be repeated.")]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", envvar="SHIFTPROOF_DATA", help="Folder with the data of streams that need files.")
]


@ended_by_sigterm()
def run(
    suite: Annotated[str, typer.Argument(metavar="[SUITE|FILE.toml]", help="A suite, or a file with one.")] = "",
    stream: Annotated[str | None, typer.Option(help="Streams instead of a suite: S or S,S2.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Their strategies: T[@PRESET] or T,T2.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds instead of the suite's own, such as 0,1,2.")] = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="SCOPE.KEY=VALUE", help="Set a knob; may be repeated.")] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Cells at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="How cells are run; `shiftproof list executors`.")] = "process",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder for records and board; runs/SUITE if not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the table of cells and start nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Run finished cells again.")] = False,
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Run a suite, or streams with strategies; what is finished is kept, so the same command goes on after a stop."""
    if jobs < 1:
        raise InputError(f"expected --jobs of 1 or more, got {jobs}")
    check_device(device)
    known = catalogue()
    spec = _chosen_suite(known, suite, _names("--stream", stream), _names("--strategy", strategy), plugin)
    if seeds is not None:
        spec = replace(spec, seeds=parse_seeds(seeds))
    folder = _out_folder(out, spec.name)
    registry = registry_for(known, names_of(spec, executor, known), plugin)

    from shiftproof.benchmark import provenance  # torch, from here on
    from shiftproof.benchmark.running import matrix

    options = matrix.RunOptions(
        folder,
        executor,
        jobs,
        chosen_device(device, registry.executors[executor].elsewhere),
        str(data_root) if data_root else None,
        retry_failed,
        rerun,
        command=provenance.command_line(["shiftproof", *sys.argv[1:]]),
        entry_points=registry.only,
        files=tuple(str(file) for file in registry.files),
    )
    plan = matrix.plan(registry, spec, overrides, options.device, options.data_root)
    if dry_run:
        print_plan(plan, matrix.states(plan, folder), rerun)
        return
    _refuse_nothing_to_run(plan)
    check_writable(folder)
    check_neighbours(plan, folder)
    with show_progress(quiet) as progress:
        outcome = matrix.run_plan(plan, registry, options, progress)
    report(plan, registry, options, outcome)


def _chosen_suite(
    known: Catalogue, suite: str, streams: tuple[str, ...], strategies: tuple[str, ...], files: Sequence[Path]
) -> SuiteSpec:
    """The named suite, the one in a file, or one made of --stream and --strategy."""
    if suite and (streams or strategies):
        raise InputError(f"expected a suite or --stream with --strategy, got both: {suite!r} beside them; leave one out")
    if suite.endswith(".toml"):
        return read_suite(Path(suite))
    if suite:
        return _named_suite(known, suite, files)
    if not streams or not strategies:
        got = "--stream alone" if streams else "--strategy alone" if strategies else "none of them"
        what = "streams" if strategies else "strategies" if streams else "suites"
        ways = "a suite, a TOML file, or --stream S with --strategy T"
        raise InputError(f"expected {ways}, got {got}; `shiftproof list {what}` names the {what}")
    return SuiteSpec("-".join(streams), f"{', '.join(strategies)} on {', '.join(streams)}", streams, strategies)


def _named_suite(known: Catalogue, name: str, files: Sequence[Path]) -> SuiteSpec:
    suites = known.items("suite")
    if name in suites or not files:
        return suite_of(known.item("suite", name))
    from shiftproof.benchmark.registry.lookup import load_registry  # only a loose file can have it now

    loose = load_registry((), files).suites
    if name not in loose:
        raise unknown("suite", name, {*suites, *loose}, problems_hint(known.broken))
    return loose[name]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "0,1,2". Raises InputError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("0*[0-9]{1,10}", part) for part in parts):
        limit = f"they go up to {LARGEST_SEED}"
        raise InputError(f"expected --seeds as integers of 0 or more, got {text!r}; {limit}; write for example 0,1,2")
    return check_seeds([int(part) for part in parts], "--seeds")


def _names(option: str, text: str | None) -> tuple[str, ...]:
    """What an option lists, each once; nothing where it is not given."""
    if text is None:
        return ()
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"expected {option} as one name or several joined by ',', each once, got {text!r}")
    return tuple(names)


def _out_folder(out: str | None, suite: str) -> Path:
    """Where records go. What can be seen to be no folder is refused before anything heavy is imported."""
    if out == "":
        raise InputError("expected a folder for --out, got ''; leave it out for runs/SUITE")
    folder = Path("runs", suite) if out is None else Path(out)
    # os.path takes a name that is too long for one that is not there; making the folder then says what is wrong with it.
    nearest = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path())
    if not nearest.is_dir():
        raise InputError(f"expected a folder for --out, got {folder}, where {nearest.name} is a file; name another one")
    return folder


def _refuse_nothing_to_run(plan: Plan) -> None:
    if plan.cells:
        return
    reasons = "; ".join(f"{skipped.strategy} on {skipped.stream}: {skipped.reason}" for skipped in plan.skipped[:NAMED])
    more = f"; and {len(plan.skipped) - NAMED} more" if len(plan.skipped) > NAMED else ""
    raise InputError(f"expected a strategy that can run on one of the streams, got none: {reasons}{more}")


def names_of(spec: SuiteSpec, executor: str, known: Catalogue) -> dict[str, list[str]]:
    """What a run looks up, by kind."""
    return {"strategy": with_trainer(spec.strategies, known), "stream": list(spec.streams), "executor": [executor]}


def with_trainer(labels: Sequence[str], known: Catalogue) -> list[str]:
    """Names of strategies without their presets, and who fine-tunes the experts that a merge or a transport is given."""
    names = [label.partition("@")[0] for label in labels]
    has_trainer = EXPERT_TRAINER in names or EXPERT_TRAINER not in known.items("strategy")
    return names if has_trainer else [*names, EXPERT_TRAINER]


def registry_for(known: Catalogue, names: Mapping[str, Sequence[str]], files: Sequence[Path] = ()) -> Registry:
    """A registry with the plugins that provide these names, those that take part in every run, and loose files.

    Raises:
        InputError: If a name is nowhere, with the nearest spelling among everything that is installed.
    """
    for kind, listed in names.items():
        for name in listed if not files else ():
            known.item(kind, name)
    from shiftproof.benchmark.registry.lookup import load_registry  # imports the plugins, and they import torch

    registry = load_registry(known.providers(names) | known.with_hook(ALWAYS), files)
    problems = known.broken | {problem.name: problem.error for problem in registry.problems}
    for kind, listed in names.items():
        loaded = getattr(registry, KINDS[kind])
        for name in listed:
            if name not in loaded:
                raise unknown(kind, name, {*loaded, *known.items(kind)}, problems_hint(problems))
    for name in names.get("executor", ()):
        if reason := registry.executors[name].unavailable:
            raise InputError(f"expected an executor that can run here, got {name!r}: {reason}")
    return registry


def check_device(device: str) -> None:
    """Raises InputError for a device that nobody knows."""
    if device not in DEVICES:
        raise InputError(f"expected --device as one of {', '.join(DEVICES)}, got {device!r}{did_you_mean(device, DEVICES)}")


def chosen_device(device: str, elsewhere: bool = False) -> str:
    """ "cpu" or "cuda"; auto takes a GPU if there is one. Raises InputError for cuda without one, unless it is elsewhere."""
    import torch

    has_gpu = torch.cuda.is_available() or (elsewhere and device == "cuda")
    if device == "cuda" and not has_gpu:
        raise InputError("expected a CUDA device for --device cuda, got none on this machine; use --device auto or cpu")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def check_writable(folder: Path) -> None:
    """Make the output folder before anything runs. Raises OutputError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"1")
    except OSError as error:
        advice = "free space or choose another folder with --out"
        raise OutputError(f"expected to write into {folder}, got: {error.strerror}; {advice}") from error
