"""`shiftproof transport`: a fine-tuning on disk is carried to a new release of its backbone."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftproof.benchmark.cli.console import heavy_imports, print_table
from shiftproof.benchmark.cli.method import strategy_named
from shiftproof.benchmark.cli.run import PluginFiles
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.paths import check_apart, check_file, check_folder

if TYPE_CHECKING:
    from shiftproof.benchmark.experiences import StateDict
    from shiftproof.benchmark.merging.inputs import Located
    from shiftproof.benchmark.transporting.alignment import Alignment
    from shiftproof.benchmark.transporting.disk import Releases
    from shiftproof.benchmark.transporting.method import Progress, RebasinMethod
    from shiftproof.benchmark.transporting.specification import PermutationSpec, Shapes

    Pair = tuple[StateDict, StateDict]
    """Both releases, in the tensors that are aligned."""

PROVENANCE = "shiftproof.transport"  # key of the metadata
DIAGNOSTICS = ("alignment.json", "alignment.png")  # in the folder of that name


def transport(
    method: Annotated[str, typer.Argument(metavar="METHOD[@PRESET]", help="A strategy that transports without data.")],
    source_base: Annotated[Path, typer.Option(help="The old release: *.safetensors, its index or folder, *.pt, *.pth, *.bin.")],
    source_tuned: Annotated[Path, typer.Option(help="The old release after fine-tuning; it may have a head of its own.")],
    target_base: Annotated[Path, typer.Option(help="The new release.")],
    out: Annotated[Path, typer.Option(help="transported.safetensors, or for a sharded target a folder.")],
    alpha: Annotated[float | None, typer.Option(help="Scale of the task vector; the method's if not given.")] = None,
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a knob; may be repeated.")] = [],  # noqa: B006
    heads: Annotated[int, typer.Option(help="Attention heads, which a checkpoint does not tell.")] = 0,
    specification: Annotated[Path | None, typer.Option(help="Permutations of an unknown architecture, as JSON.")] = None,
    save_alignment: Annotated[Path | None, typer.Option(help="Write the alignment, for other fine-tunings.")] = None,
    alignment: Annotated[Path | None, typer.Option(help="Take an alignment that was saved instead of searching.")] = None,
    diagnostics: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the alignment as picture and JSON.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Align and tell how alike the releases become; no output.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    plugin: PluginFiles = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Carry a fine-tuning over to a new release of its backbone, without data and without training."""
    from shiftproof.benchmark.merging.hashing import Hashing
    from shiftproof.benchmark.merging.inputs import check_output, locate

    if alignment and save_alignment:
        raise InputError(
            "expected one of --alignment and --save-alignment, got both; an alignment that was read is saved already"
        )
    located = [locate(path) for path in (target_base, source_base, source_tuned)]
    check_output(out, located, force or dry_run)
    written = _written(out, located[0], save_alignment, diagnostics, force)
    models = zip(("--target-base", "--source-base", "--source-tuned"), located, strict=True)
    others = (("--alignment", alignment), ("--specification", specification))
    check_apart(written, {**{one: item.every_file for one, item in models}, **{one: [file] for one, file in others if file}})
    wanted = [*overrides, *([f"alpha={alpha}"] if alpha is not None else [])]

    files = [file for item in located for file in item.files]
    with nullcontext() if dry_run else Hashing(files) as hashing:
        with heavy_imports():
            from shiftproof.benchmark.merging.checkpoints import opened
            from shiftproof.benchmark.transporting.disk import releases, states

            built, facts = _method(method, wanted, plugin)
        with opened(located) as (target, source, tuned):
            found = releases(source, tuned, target, lambda shapes: _specification(shapes, heads, specification))
            pair = states(found)
            aligned, facts = _aligned(built, facts, found, pair, alignment, quiet)
            _report(aligned, pair, diagnostics)
            del pair
            if save_alignment is not None:
                from shiftproof.benchmark.transporting.files import save_alignment as save

                save(save_alignment, aligned, facts)
                typer.echo(f"wrote: {save_alignment}")
            if hashing is not None:
                _write(built, facts, found, aligned, hashing.result(), out, force, quiet)


def _written(
    out: Path, target: Located, save_alignment: Path | None, diagnostics: Path | None, force: bool
) -> dict[str, list[Path]]:
    """Option to the files that are written for it, of those beside --out once they were checked."""
    from shiftproof.benchmark.merging.inputs import targets

    if save_alignment is not None:
        check_file("--save-alignment", save_alignment, force)
    if diagnostics is not None:
        check_folder("--diagnostics", diagnostics)
    return {
        "--out": targets(out, target),
        "--save-alignment": [save_alignment] if save_alignment else [],
        "--diagnostics": [diagnostics / name for name in DIAGNOSTICS] if diagnostics else [],
    }


def _method(label: str, overrides: Sequence[str], plugin: Sequence[Path]) -> tuple[RebasinMethod, dict[str, Any]]:
    """The method, and what a saved alignment says about it.

    Raises:
        InputError: If there is none of that name, or it does not transport checkpoints.
    """
    from shiftproof.benchmark.codehash import module_of, plugin_sha256
    from shiftproof.benchmark.experiences import TransportExperience
    from shiftproof.benchmark.transporting.method import RebasinMethod

    spec, preset, config = strategy_named(label, overrides, plugin)
    instead = "`shiftproof run` runs it on a stream"
    if spec.consumes is not TransportExperience or spec.needs_data:
        why = "which needs data" if spec.needs_data else "which does not"
        raise InputError(f"expected a method that transports without data, got {spec.name!r}, {why}; {instead}")
    can_align = hasattr(spec.build, "align") or not isinstance(spec.build, type)
    built = spec.build(config, None) if can_align else None  # type: ignore[arg-type]  # there is no run to have a context
    if not isinstance(built, RebasinMethod):
        raise InputError(f"expected a method that aligns two releases, got {spec.name!r}, which does not; {instead}")
    knobs = {name: value for name, value in asdict(config).items() if name != "alpha"}
    code_sha256 = plugin_sha256(module_of(spec.build))
    return built, {"method": spec.name, "preset": preset, "config": knobs, "code_sha256": code_sha256}


def _specification(shapes: Shapes, heads: int, path: Path | None) -> PermutationSpec:
    from shiftproof.benchmark.transporting.architectures import derive

    if path is None:
        return derive(shapes, heads)
    from shiftproof.benchmark.transporting.notation import read_specification

    return read_specification(path, shapes)


def _aligned(
    built: RebasinMethod, facts: dict[str, Any], found: Releases, pair: Pair, path: Path | None, quiet: bool
) -> tuple[Alignment, dict[str, Any]]:
    """The alignment that a file has, or that the method finds; and what is known of it."""
    from shiftproof.benchmark.transporting.files import identity_of, load_alignment

    source, target = pair
    specification = found.specification.restricted(frozenset(found.shared))
    identity = identity_of(source, target)
    if path is not None:
        aligned, told = load_alignment(path, specification, identity)
        if told.get("method") != facts["method"] or told.get("config") != facts["config"]:
            known, asked = told.get("config") or {}, facts["config"]
            knobs = [f"{name}={known.get(name)}" for name in asked if known.get(name) != asked[name]]
            made = " with ".join([str(told.get("method")), *([", ".join(knobs)] if knobs else [])])
            raise InputError(f"{path}: expected an alignment by the method and knobs given, got one by {made}")
        return aligned, {**facts, **identity}
    started = time.perf_counter()
    with _sweeps(quiet, len(specification.sizes)) as progress:
        aligned = built.align(source, target, specification, progress)
    search = aligned.search
    parts = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in search.seconds.items())
    sweeps = f"{search.sweeps} sweep{'s' * (search.sweeps != 1)}"
    ended = "converged" if search.converged else "stopped"
    took = f"aligned in {time.perf_counter() - started:.1f} s: {ended} after {sweeps}, {search.visits} assignments"
    typer.echo(took + (f" ({parts})" if parts else ""))
    return aligned, {**facts, **identity}


def _report(aligned: Alignment, pair: Pair, folder: Path | None) -> None:
    """Print how alike the releases become, and write picture and JSON into the folder."""
    from shiftproof.benchmark.transporting.diagnostics import matches, moves

    layers, moved = matches(aligned, *pair), moves(aligned)
    header = ["layer", "parameters", "similarity", "aligned", "at random"]
    rows = [[one.layer, f"{one.parameters:,}", *(f"{v:.4f}" for v in (one.before, one.matched, one.random))] for one in layers]
    print_table(header, rows)
    units = sum(one.size for one in moved)
    typer.echo(f"units that move: {sum(one.size * one.units for one in moved):,.0f} of {units:,}")
    heads = [one.heads for one in moved if one.heads is not None]
    if heads:
        typer.echo(f"attention heads that move: {sum(heads) / len(heads):.0%}")
    if folder is not None:
        from shiftproof.benchmark.analysis.alignments import write_alignment

        typer.echo("".join(f"wrote: {file}\n" for file in write_alignment(layers, moved, folder)), nl=False)


def _write(
    built: RebasinMethod,
    facts: Mapping[str, Any],
    found: Releases,
    aligned: Alignment,
    sha256: Mapping[Path, str],
    out: Path,
    force: bool,
    quiet: bool,
) -> None:
    from importlib.metadata import version

    from shiftproof.benchmark.merging.writing import Output
    from shiftproof.benchmark.records import canonical
    from shiftproof.benchmark.transporting.disk import write
    from shiftproof.benchmark.transporting.files import sha256_of_permutations

    roles = {"target_base": found.target, "source_base": found.source, "source_tuned": found.tuned}
    inputs = {role: [{"name": file.name, "sha256": sha256[file]} for file in one.located.files] for role, one in roles.items()}
    recipe = {**facts, "alpha": built.config.alpha, "permutations_sha256": sha256_of_permutations(aligned)}
    text = canonical({**recipe, "inputs": inputs, "shiftproof": version("shiftproof")})
    try:
        with Output(out, found.layout(), text, force, PROVENANCE) as output:
            with _tensors(quiet, len(found.shared) + len(found.own)) as progress:
                fates = write(found, aligned, built.config.alpha, output, progress)
            files = output.commit(text)
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    counts: Counter[str] = Counter(fates.values())
    print_table(["fate", "tensors", "meaning"], [[fate, str(counts[fate]), MEANING[fate]] for fate in MEANING if counts[fate]])
    typer.echo("".join(f"wrote: {file}\n" for file in files), nl=False)


MEANING = {
    "transported": "the new release's, plus what fine-tuning has changed",
    "unchanged": "the new release's; fine-tuning has not changed it",
    "left": "the new release's; no parameter (running statistics, counters)",
    "carried over": "the fine-tuned model's own, permuted",
}


@contextmanager
def _sweeps(quiet: bool, permutations: int) -> Iterator[Progress]:
    """A bar over the permutations of a sweep; how many sweeps it takes nobody knows before."""
    with _bar(quiet, permutations) as update:
        yield lambda sweep, permutation: update(f"sweep {sweep + 1}: {permutation}")


@contextmanager
def _tensors(quiet: bool, total: int) -> Iterator[Callable[[str], None]]:
    with _bar(quiet, total) as update:
        yield update


@contextmanager
def _bar(quiet: bool, total: int) -> Iterator[Callable[[str], None]]:
    """Counts up to `total` on standard error, and from the start again; nothing where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def update(text: str) -> None:
            if bar.tasks[0].completed >= total:
                bar.update(task, completed=0)
            bar.update(task, advance=1, description=text)

        yield update
