"""`shiftproof experts`: the fine-tuned experts of streams: make them, list them, hand them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shiftproof.benchmark.cli.analyses import show_progress
from shiftproof.benchmark.cli.console import catalogue, print_table
from shiftproof.benchmark.cli.run import DataRoot, PluginFiles, check_device, chosen_device, parse_seeds, registry_for
from shiftproof.benchmark.contracts import EXPERT_TRAINER
from shiftproof.benchmark.folders import cache_folder
from shiftproof.benchmark.names import unknown

if TYPE_CHECKING:
    from shiftproof.benchmark.inventory import CachedExpert
    from shiftproof.benchmark.records import RunRequest
    from shiftproof.benchmark.registry.lookup import Registry
    from shiftproof.benchmark.streams import Stream

app = typer.Typer(help="Fine-tuned experts: make them ahead of runs, see what there is, hand them on.", rich_markup_mode=None)

StreamName = Annotated[str, typer.Argument(metavar="STREAM", help="A stream with data.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SCOPE.KEY=VALUE", help="Set a knob of stream, recipe or base."),
]
Device = Annotated[str, typer.Option("--device", help="What experts are made on: auto, cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
SHORT = 12  # characters of a hash in a table


@dataclass(frozen=True)
class _Chosen:
    """A stream that was built as the options say."""

    registry: Registry
    request: RunRequest
    stream: Stream
    device: str


@app.command("list")
def list_experts(
    streams: Annotated[list[str], typer.Argument(metavar="[STREAM]...", help="Only experts of these streams.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the experts that lie in the cache, by the stream that they were first made for."""
    from shiftproof.benchmark.inventory import cached_experts

    every, unnamed = cached_experts(cache_folder())
    known = {one.stream for one in every}
    for name in streams:
        if name not in known:
            installed = catalogue().items("stream")
            if name not in installed:
                raise unknown("stream", name, known | installed.keys())
    found = [one for one in every if not streams or one.stream in streams]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
    elif found:
        print_table(["stream", "seed", "expert", "set", "made with", "MB", "hash"], [_row(one) for one in found])
        typer.echo(f"{len(found)} in all, {sum(one.size for one in found) / 1e6:.1f} MB")
    else:
        typer.echo("no such experts in the cache; `shiftproof experts train STREAM` makes them")
    if unnamed:
        typer.echo(f"{unnamed} more were made by another version and do not say what they are", err=True)


@app.command()
def train(
    stream: StreamName,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs that they are for.")] = "0,1,2",
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which of them are missing; make nothing.")] = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the experts of a stream that are not in the cache yet; runs then take them from there."""
    numbers = parse_seeds(seeds)
    chosen = _chosen(stream, numbers[0], "", overrides, device, plugin, data_root)

    from shiftproof.benchmark.cache import Cache
    from shiftproof.benchmark.experts import making

    cache = Cache(makes=not dry_run)
    total = len(numbers) * len(making.sources(chosen.stream))
    with show_progress("experts", total, quiet or dry_run) as progress:
        rows = making.train(chosen.registry, chosen.request, chosen.stream, numbers, chosen.device, cache, progress)
    cells = [["all" if row.seed is None else str(row.seed), row.name, row.state] for row in rows]
    print_table(["seed", "expert", "state"], cells)
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("missing" if dry_run else "trained", "found"))
    typer.echo(counts)


@app.command()
def export(
    stream: StreamName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of the experts.")] = 0,
    fold: Annotated[str, typer.Option("--fold", help="Only the experts of this fold; of all if not given.")] = "",
    overrides: Overrides = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace an export in a folder that exists.")] = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Write base and experts out of the cache into safetensors files, for `merge` and `analyze` and for other machines."""
    chosen = _chosen(stream, seed, fold, overrides, device, plugin, data_root)

    from shiftproof.benchmark.experts.exporting import export_experts

    with show_progress("experts", None, quiet) as progress:
        files = export_experts(chosen.registry, chosen.request, chosen.stream, chosen.device, out, force, progress)
    typer.echo("".join(f"wrote: {file}\n" for file in files), nl=False)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote on another machine.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="base.file=PATH", help="Where the base lies, if it is a file.")
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace what the cache has with other weights.")] = False,
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Take exported experts into the cache of this machine, all or none, if a run here would take them."""
    from shiftproof.benchmark.experts.files import read_export

    export = read_export(folder)
    told = export.base
    given = {item.partition("=")[0] for item in overrides}
    kept = [item for item in told.set if item.partition("=")[0] not in given]
    chosen = _chosen(told.stream, told.seed, told.fold, [*kept, *overrides], "cpu", plugin, data_root)

    from shiftproof.benchmark.cache import Cache
    from shiftproof.benchmark.experts.importing import import_experts

    with show_progress("experts", len(export.experts), quiet) as progress:
        taken = import_experts(export, chosen.registry, chosen.request, chosen.stream, Cache(), force, progress)
    print_table(["expert", "state"], [[one.name, one.state] for one in taken])
    knobs = "".join(f" --set {one}" for one in told.set)
    typer.echo(f"runs with --stream {told.stream} --seeds {told.seed} --device {export.device}{knobs} take them")


def _chosen(
    name: str,
    seed: int,
    fold: str,
    overrides: Sequence[str],
    device: str,
    plugin: Sequence[Path],
    data_root: Path | None,
) -> _Chosen:
    """Build the stream, and set this process up as cells are run."""
    check_device(device)
    registry = registry_for(catalogue(), {"strategy": [EXPERT_TRAINER], "stream": [name]}, plugin)

    from shiftproof.benchmark.experts.making import request_for
    from shiftproof.benchmark.running.bases import check_base_file
    from shiftproof.benchmark.running.cells import build_stream
    from shiftproof.benchmark.running.jobs import like_a_worker

    request = request_for(registry, name, seed, fold, overrides)
    stream = build_stream(registry, request, str(data_root) if data_root else None)
    check_base_file(registry, stream)
    return _Chosen(registry, request, stream, like_a_worker(chosen_device(device)))


def _row(one: CachedExpert) -> list[str]:
    made = f"torch {one.key.get('torch')}, {one.key.get('device')}"
    knobs = " ".join(one.set) or "-"
    return [one.stream, str(one.seed), one.experience, knobs, made, f"{one.size / 1e6:.2f}", one.cache_key[:SHORT]]
