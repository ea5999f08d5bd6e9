"""`shiftproof analyze`: overlap and energy of experts, sweeps over coefficients, barriers between models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shiftproof.benchmark.cli.analyses import (
    FromStream,
    checked_folder,
    deltas_from,
    plane_from,
    report,
    show_progress,
    transports_from,
)
from shiftproof.benchmark.cli.run import DataRoot, PluginFiles

app = typer.Typer(help="Look at experts, and at what lies between them.", rich_markup_mode=None)

BaseFile = Annotated[Path | None, typer.Option("--base", help="Checkpoint before fine-tuning, as for `shiftproof merge`.")]
ExpertFiles = Annotated[list[Path], typer.Option("--expert", help="Checkpoint after it; give one for each expert.")]
StreamName = Annotated[str, typer.Option("--stream", help="A stream, whose experts are trained unless they are cached.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the experts.")]
FoldName = Annotated[str, typer.Option("--fold", help="Only this fold of the stream; all if not given.")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="SCOPE.KEY=VALUE", help="Set a knob of stream, recipe or base."),
]
Layers = Annotated[str, typer.Option("--layers", metavar="PART", help="Only matrices whose name contains this.")]
Methods = Annotated[str, typer.Option("--strategy", metavar="T[@PRESET],T2", help="Methods that align two releases.")]
Pair = Annotated[str, typer.Option("--experts", metavar="A,B", help="Two experts of the stream by name; all it has if two.")]
EvalNames = Annotated[str, typer.Option("--eval", metavar="E,E2", help="Eval sets by name; all of the folds if not given.")]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for pictures and numbers.", callback=checked_folder)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option("--device", help="Where experts are trained and measured: auto, cpu or cuda.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def overlap(
    base: BaseFile = None,
    expert: ExpertFiles = [],  # noqa: B006
    stream: StreamName = "",
    seed: Seed = 0,
    fold: FoldName = "",
    overrides: Overrides = [],  # noqa: B006
    layers: Layers = "",
    epsilon: Annotated[float | None, typer.Option(help="Part of a delta's norm outside its subspace; 0.243.")] = None,
    one_fewer: Annotated[bool, typer.Option("--one-fewer", help="One vector fewer, as in the released code.")] = False,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Subspace alignment ratio and principal angles between experts; rows are projected upon the subspaces of columns."""
    from shiftproof.benchmark.analysis import overlap as subspaces, tables  # torch, from here on

    rule = subspaces.SubspaceRule(subspaces.EPSILON if epsilon is None else epsilon, one_fewer)
    origin = FromStream(stream, seed, fold, overrides, device, plugin, data_root, quiet)
    with deltas_from(base, expert, origin) as deltas:
        names = deltas.matrices(layers)
        with show_progress("layers", len(names), quiet) as progress:
            found = subspaces.overlap(deltas, layers, rule, progress)

    def draw() -> dict[str, bytes]:
        from shiftproof.benchmark.analysis.figures import draw_overlap

        return draw_overlap(found)

    note = tables.unchanged_note(found.unchanged)
    report(tables.overlap_tables(found), tables.overlap_json(found), note, draw, out, as_json)


@app.command()
def sigma(
    base: BaseFile = None,
    expert: ExpertFiles = [],  # noqa: B006
    stream: StreamName = "",
    seed: Seed = 0,
    fold: FoldName = "",
    overrides: Overrides = [],  # noqa: B006
    layers: Layers = "",
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Energy on and off the diagonal of SCORE's Sigma, of every matrix; drawn for the layers chosen, or of many for three."""
    from shiftproof.benchmark.analysis import energy, tables

    origin = FromStream(stream, seed, fold, overrides, device, plugin, data_root, quiet)
    with deltas_from(base, expert, origin) as deltas:
        with show_progress("layers", len(deltas.matrices(layers)), quiet) as progress:
            found = energy.energies(deltas, layers, progress)

        def draw() -> dict[str, bytes]:
            from shiftproof.benchmark.analysis.figures import chosen_layers, draw_sigma

            drawn = chosen_layers(found.layers)
            return draw_sigma([(one, energy.sigma_of(deltas, one.name)) for one in drawn])

        note = tables.unchanged_note(found.unchanged)
        report(tables.sigma_tables(found), tables.sigma_json(found), note, draw, out, as_json)


@app.command()
def sweep(
    stream: StreamName,
    experts: Pair = "",
    seed: Seed = 0,
    fold: FoldName = "",
    evals: EvalNames = "",
    overrides: Overrides = [],  # noqa: B006
    low: Annotated[float, typer.Option(help="Smallest coefficient.")] = 0.0,
    high: Annotated[float, typer.Option(help="Largest coefficient.")] = 2.0,
    step: Annotated[float, typer.Option(help="Between coefficients.")] = 0.1,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Accuracy over the coefficients of two experts, with the mean, the sum and the best marked."""
    from shiftproof.benchmark.analysis import sweep as sweeping, tables

    values = sweeping.coefficients(low, high, step)
    origin = FromStream(stream, seed, fold, overrides, device, plugin, data_root, quiet)
    plane, sets = plane_from(origin, experts, evals)
    with show_progress("models", len(values) ** 2, quiet) as progress:
        found = sweeping.sweep(plane, sets, values, progress)

    def draw() -> dict[str, bytes]:
        from shiftproof.benchmark.analysis.landscapes import draw_sweep

        return draw_sweep(found)

    note = "best: chosen on the very data that it is measured on"
    report(tables.sweep_tables(found), tables.sweep_json(found), note, draw, out, as_json)


@app.command()
def barrier(
    stream: StreamName,
    experts: Pair = "",
    seed: Seed = 0,
    fold: FoldName = "",
    evals: EvalNames = "",
    overrides: Overrides = [],  # noqa: B006
    points: Annotated[int, typer.Option(help="On the line, ends included.")] = 11,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Loss barrier on the line between two experts, or between 'base' and an expert."""
    from shiftproof.benchmark.analysis import barrier as lines, tables

    lines.check_points(points)
    origin = FromStream(stream, seed, fold, overrides, device, plugin, data_root, quiet)
    plane, sets = plane_from(origin, experts, evals)
    with show_progress("models", points, quiet) as progress:
        found = lines.barrier(plane, sets, points, progress)

    def draw() -> dict[str, bytes]:
        from shiftproof.benchmark.analysis.landscapes import draw_barrier

        return draw_barrier(found)

    report(tables.barrier_tables(found), tables.barrier_json(found), tables.barrier_note(found), draw, out, as_json)


@app.command()
def rebasin(
    stream: StreamName,
    methods: Methods = "",
    seed: Seed = 0,
    overrides: Overrides = [],  # noqa: B006
    points: Annotated[int, typer.Option(help="On the way, ends included.")] = 11,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Loss on the way from the aligned old release of a stream to the new one, with residual maps and without."""
    from shiftproof.benchmark.analysis import barrier as lines, release_reports as reports

    lines.check_points(points)
    origin = FromStream(stream, seed, "", overrides, device, plugin, data_root, quiet)
    found, named = transports_from(origin, methods)

    from shiftproof.benchmark.analysis import releases

    with show_progress("methods", None, quiet) as progress:
        shares, measured = releases.barriers(found, named, points, progress)

    def draw() -> dict[str, bytes]:
        return reports.draw_barriers(stream, shares, measured)

    tables = reports.barrier_tables(shares, measured)
    report(tables, reports.barrier_json(stream, shares, measured), "", draw, out, as_json)


@app.command()
def alpha(
    stream: StreamName,
    methods: Methods = "",
    seed: Seed = 0,
    overrides: Overrides = [],  # noqa: B006
    high: Annotated[float, typer.Option(help="Largest scale.")] = 2.0,
    step: Annotated[float, typer.Option(help="Between scales.")] = 0.1,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "auto",
    plugin: PluginFiles = [],  # noqa: B006
    data_root: DataRoot = None,
    quiet: Quiet = False,
) -> None:
    """Accuracy over the scale of a task vector that is carried to a new release, by method."""
    from shiftproof.benchmark.analysis import release_reports as reports, sweep as sweeping

    alphas = sweeping.coefficients(0.0, high, step)
    origin = FromStream(stream, seed, "", overrides, device, plugin, data_root, quiet)
    found, named = transports_from(origin, methods)

    from shiftproof.benchmark.analysis import releases

    with show_progress("methods", len(named), quiet) as progress:
        curves = releases.scales(found, named, alphas, progress)
    groups = next(iter(found.experiences.values()))[1][0].group_names

    def draw() -> dict[str, bytes]:
        return reports.draw_scales(stream, alphas, groups, curves)

    tables = reports.scale_tables(alphas, groups, curves)
    report(tables, reports.scale_json(stream, alphas, list(found.experiences), groups, curves), "", draw, out, as_json)
