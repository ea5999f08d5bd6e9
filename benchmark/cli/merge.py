"""`shiftproof merge`: base and experts on disk become one checkpoint on disk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shiftproof.benchmark.cli.console import heavy_imports, print_table
from shiftproof.benchmark.cli.method import strategy_named
from shiftproof.benchmark.cli.run import DEVICES, PluginFiles, chosen_device
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import did_you_mean

if TYPE_CHECKING:
    from shiftproof.benchmark.merging.checkpoints import Checkpoint
    from shiftproof.benchmark.merging.disk import Made
    from shiftproof.benchmark.merging.driver import Merging, TensorRow
    from shiftproof.benchmark.merging.method import MergeMethod

DTYPES = ("auto", "float32", "float64")
MOST_JOBS = 16  # unless told otherwise: each thread takes some memory, and files are read no faster by more


def merge(
    method: Annotated[str, typer.Argument(metavar="METHOD[@PRESET]", help="A strategy that merges experts without data.")],
    base: Annotated[Path, typer.Option(help="Before fine-tuning: *.safetensors, its index or folder, *.pt, *.pth, *.bin.")],
    expert: Annotated[list[Path], typer.Option(help="After it; give one for each expert.")],
    out: Annotated[Path, typer.Option(help="merged.safetensors, or for a sharded base a folder.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a knob; may be repeated.")] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="What to compute in: float32, float64 or auto.")] = "auto",
    jobs: Annotated[int | None, typer.Option(help="Threads, one tensor each; processors, at most 16, if not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do and cost; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
    plugin: PluginFiles = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Merge fine-tuned checkpoints, tensor by tensor; the output keeps names, dtypes and metadata of the base."""
    _check_choice("--device", device, DEVICES)
    _check_choice("--dtype", dtype, DTYPES)
    jobs = min(_processors(), MOST_JOBS) if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"expected --jobs of 1 or more, got {jobs}")
    from shiftproof.benchmark.merging.hashing import Hashing
    from shiftproof.benchmark.merging.inputs import check_output, locate

    located = [locate(path) for path in (base, *expert)]
    if len(expert) < 2:
        raise InputError(f"expected two experts or more, got {len(expert)}; give --expert once for each")
    check_output(out, located, force)
    files = [file for item in located for file in item.files]
    with nullcontext() if dry_run else Hashing(files, max(1, jobs - 1)) as hashing:
        with heavy_imports():
            from shiftproof.benchmark.merging.checkpoints import check_alike, opened
            from shiftproof.benchmark.merging.disk import check_refusals

            built, made = _method(method, overrides, plugin, chosen_device(device), dtype)
        with opened(located) as checkpoints:
            check_alike(checkpoints[0], checkpoints[1:])
            merging = _merging(built, made, checkpoints, jobs)
            check_refusals(merging)
            if hashing is None:
                _report_plan(merging, checkpoints)
            else:
                _merge(merging, checkpoints, out, made, hashing.result, force, quiet)


def _merge(
    merging: Merging,
    checkpoints: Sequence[Checkpoint],
    out: Path,
    made: Made,
    hashes: Callable[[], Any],
    force: bool,
    quiet: bool,
) -> None:
    from shiftproof.benchmark.merging.disk import merge_files
    from shiftproof.benchmark.merging.pool import few_arenas

    few_arenas()
    started = time.perf_counter()
    try:
        with _show_progress(merging, quiet) as progress:
            rows, files = merge_files(merging, checkpoints, out, made, hashes, force, progress)
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
    _print_rows(rows, merging, checkpoints)
    typer.echo(f"{len(checkpoints) - 1} experts merged by {made.method} in {time.perf_counter() - started:.1f} s")
    typer.echo("".join(f"wrote: {file}\n" for file in files), nl=False)


def _method(label: str, overrides: Sequence[str], plugin: Sequence[Path], device: str, dtype: str) -> tuple[MergeMethod, Made]:
    """The method, ready to merge, and what its recipe says.

    Raises:
        InputError: If there is none of that name, or it cannot merge checkpoints.
    """
    from shiftproof.benchmark.codehash import module_of, plugin_sha256
    from shiftproof.benchmark.experiences import ExpertExperience
    from shiftproof.benchmark.lifting import needs_data
    from shiftproof.benchmark.merging.disk import Made
    from shiftproof.benchmark.merging.method import MergeMethod

    spec, preset, config = strategy_named(label, overrides, plugin)
    name = spec.name
    instead = "`shiftproof run` runs it on a stream"
    if not issubclass(spec.consumes, ExpertExperience):
        raise InputError(f"expected a method that merges experts, got {name!r}, which learns from data; {instead}")
    if needs_data(spec, config):
        which = repr(name) if spec.needs_data else f"{name!r} with {spec.data_knob}"
        raise InputError(f"expected a method that merges without data, got {which}, which needs data; {instead}")
    # A reference such as the base itself is a strategy on experts and merges nothing.
    can_merge = hasattr(spec.build, "merge") or not isinstance(spec.build, type)
    built = spec.build(config, None) if can_merge else None  # type: ignore[arg-type]  # there is no run to have a context
    if not isinstance(built, MergeMethod):
        raise InputError(f"expected a method that merges tensors, got {name!r}, which does not; {instead}")
    return built, Made(name, preset, config, plugin_sha256(module_of(spec.build)), device, dtype)


def _merging(method: MergeMethod, made: Made, checkpoints: Sequence[Checkpoint], jobs: int) -> Merging:
    import torch

    from shiftproof.benchmark.merging.driver import Merging

    dtype = None if made.dtype == "auto" else getattr(torch, made.dtype)
    return Merging(method, checkpoints[0], checkpoints[1:], dtype=dtype, device=made.device, jobs=jobs)


def _report_plan(merging: Merging, checkpoints: Sequence[Checkpoint]) -> None:
    from shiftproof.benchmark.merging.disk import cost_of, planned

    _print_rows(planned(merging), merging, checkpoints)
    cost = cost_of(merging, checkpoints[0])
    typer.echo(f"passes: {cost.passes}, {_size(cost.read)} to read, and once the inputs for their hashes")
    typer.echo(f"output: {_size(cost.written)}")
    typer.echo(f"memory: {_size(cost.memory)} for base and experts, beside torch and what the method needs for itself")


def _print_rows(rows: Sequence[TensorRow], merging: Merging, checkpoints: Sequence[Checkpoint]) -> None:
    from shiftproof.benchmark.merging.disk import summary

    whole = summary(rows, merging.method)
    total = sum(elements for _, _, _, elements in whole) or 1
    cells = [[rule, str(tensors), f"{n:,}", f"{n / total:.1%}", why or "-"] for rule, why, tensors, n in whole]
    for checkpoint in checkpoints:
        for why in dict.fromkeys(checkpoint.skipped.values()):
            names = [name for name, reason in checkpoint.skipped.items() if reason == why]
            cells.append(["skipped", str(len(names)), "-", "-", f"{why} in {checkpoint.label}: {', '.join(names[:3])}"])
        if checkpoint.wrapper:
            typer.echo(f"{checkpoint.label}: took the tensors under {checkpoint.wrapper!r}")
    print_table(["rule", "tensors", "parameters", "share", "why"], cells)


@contextmanager
def _show_progress(merging: Merging, quiet: bool) -> Iterator[Callable[[str], None]]:
    """A bar that counts parameters over all passes, on standard error; nothing where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from shiftproof.benchmark.merging.sources import count

    sizes = {name: count(merging.base.shape(name)) for name in merging.base.names()}
    scanned = sum(size for name, size in sizes.items() if not merging.rule(name)[1])
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=sum(sizes.values()) + merging.method.rounds * scanned)
        yield lambda name: bar.update(task, advance=sizes[name], description=name)


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"expected {option} as one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
