"""What the commands of `shiftproof analyze` share: where experts come from, progress, and how findings are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from shiftproof.benchmark.cli.console import catalogue, print_table
from shiftproof.benchmark.cli.run import check_device, chosen_device, registry_for
from shiftproof.benchmark.contracts import EXPERT_TRAINER
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.paths import check_folder

if TYPE_CHECKING:
    from shiftproof.benchmark.analysis.deltas import Deltas
    from shiftproof.benchmark.analysis.experts import StreamExperts
    from shiftproof.benchmark.analysis.plane import Plane
    from shiftproof.benchmark.analysis.releases import Transports
    from shiftproof.benchmark.analysis.tables import Table
    from shiftproof.benchmark.experiences import EvalSet
    from shiftproof.benchmark.transporting.method import RebasinMethod

USUAL = ("vanilla", "git-rebasin", "ot", "transfusion@paper", "transfusion@shared")


@dataclass(frozen=True)
class FromStream:
    """Which experts of a stream are looked at, as the options say."""

    stream: str
    seed: int
    fold: str
    overrides: Sequence[str]
    device: str
    plugin: Sequence[Path]
    data_root: Path | None
    quiet: bool


def checked_folder(out: Path | None) -> Path | None:
    """What --out says. Raises InputError, before anything is computed, if no file could be written there."""
    if out is not None:
        check_folder("--out", out)
    return out


@contextmanager
def deltas_from(base: Path | None, experts: Sequence[Path], origin: FromStream) -> Iterator[Deltas]:
    """What experts changed: those on disk, whose files stay open inside, or those of a stream.

    Raises:
        InputError: Unless one of the two is given, or as reading checkpoints and building streams raise it.
    """
    on_disk = base is not None or bool(experts)
    if on_disk == bool(origin.stream):
        came = "both" if on_disk else "neither"
        raise InputError(f"expected --base with --expert twice or more, or --stream, got {came}; give one of them")
    if origin.stream:
        yield experts_from(origin).deltas()
        return
    if origin.fold or origin.overrides:
        raise InputError("expected --fold and --set with --stream alone, got them with checkpoints; leave them out")
    if base is None or len(experts) < 2:
        raise InputError(f"expected --base and --expert twice or more, got {len(experts)} experts{'' if base else ', no base'}")
    from shiftproof.benchmark.analysis.deltas import Deltas, labels_of
    from shiftproof.benchmark.merging.checkpoints import check_alike, opened
    from shiftproof.benchmark.merging.inputs import locate

    with opened([locate(path) for path in (base, *experts)]) as (before, *after):
        check_alike(before, after)
        yield Deltas(before, after, labels_of(experts))


def experts_from(origin: FromStream) -> StreamExperts:
    """The experts of a stream, trained unless they are in the cache."""
    check_device(origin.device)
    names = {"strategy": [EXPERT_TRAINER], "stream": [origin.stream]}
    registry = registry_for(catalogue(), names, origin.plugin)

    from shiftproof.benchmark.analysis.experts import experts_of_stream
    from shiftproof.benchmark.experts.making import request_for
    from shiftproof.benchmark.running.jobs import like_a_worker

    request = request_for(registry, origin.stream, origin.seed, origin.fold, origin.overrides)
    root = str(origin.data_root) if origin.data_root else None
    device = like_a_worker(chosen_device(origin.device))  # what is made here is what cells take out of the cache
    with show_progress("experts", None, origin.quiet) as progress:
        return experts_of_stream(registry, request, device, root, progress)


def plane_from(origin: FromStream, pair: str, evals: str) -> tuple[Plane, tuple[EvalSet, ...]]:
    """Two experts of a stream and the eval sets that they can be measured on.

    Args:
        pair: "A,B"; one of them may be 'base'. "" = the two that there are.
        evals: "E,E2"; "" = all.
    """
    found = experts_from(origin)

    from shiftproof.benchmark.analysis.experts import chosen
    from shiftproof.benchmark.analysis.plane import Plane, base_as_expert

    names = _listed(pair) or list(found.experts)
    if len(names) != 2:
        all_names = ", ".join(["base", *found.experts])
        raise InputError(f"expected --experts as two of {all_names}, got {len(names)}: {', '.join(names)}")
    partner = next((name for name in names if name in found.experts), next(iter(found.experts)))
    known = {**found.experts, "base": base_as_expert(found.experts[partner])}
    plane = Plane(*chosen("expert", known, names))
    asked = chosen("eval set", {one.name: one for one in found.evals}, _listed(evals)) or list(found.evals)
    return plane, plane.answerable(tuple(asked))


def transports_from(origin: FromStream, methods: str) -> tuple[Transports, dict[str, RebasinMethod]]:
    """The fine-tunings of a stream with a new release, and the methods that are to align it.

    Args:
        methods: "T@PRESET,T2"; "" = the usual ones.
    """
    check_device(origin.device)
    labels = _listed(methods) or list(USUAL)
    names = [EXPERT_TRAINER, *(label.partition("@")[0] for label in labels)]
    registry = registry_for(catalogue(), {"strategy": names, "stream": [origin.stream]}, origin.plugin)

    from shiftproof.benchmark.analysis.releases import method_named, transports_of_stream
    from shiftproof.benchmark.experts.making import request_for
    from shiftproof.benchmark.running.jobs import like_a_worker

    named = {label: method_named(registry, label) for label in labels}
    request = request_for(registry, origin.stream, origin.seed, "", origin.overrides)
    root = str(origin.data_root) if origin.data_root else None
    device = like_a_worker(chosen_device(origin.device))  # what is made here is what cells take out of the cache
    with show_progress("fine-tunings", None, origin.quiet) as progress:
        return transports_of_stream(registry, request, device, root, progress), named


@contextmanager
def show_progress(what: str, total: int | None, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar with an estimate on standard error; nothing where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda name: bar.update(task, advance=1, description=f"{what}: {name}")


def report(
    tables: Sequence[Table],
    content: dict[str, Any],
    note: str,
    draw: Callable[[], Mapping[str, bytes]],
    out: Path | None,
    as_json: bool,
) -> None:
    """Print tables or JSON, and write pictures and JSON into the folder or nothing; what is no JSON goes to standard error."""
    from shiftproof.benchmark.records import write_together

    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if as_json:
        typer.echo(text, nl=False)
    else:
        for place, table in enumerate(tables):
            typer.echo("\n" if place else "", nl=False)
            print_table(table.header, table.rows)
    if note:
        typer.echo(note, err=as_json)
    if out is None:
        return
    files: dict[Path, str | bytes] = {out / f"{content['analysis']}.json": text}
    files |= {out / name: picture for name, picture in draw().items()}
    write_together(files)
    typer.echo("".join(f"wrote: {file}\n" for file in files), nl=False, err=as_json)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
