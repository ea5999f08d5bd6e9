"""`shiftproof new-strategy`, `check`, `doctor` and `data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shiftproof.benchmark.cli.console import catalogue, print_table
from shiftproof.benchmark.cli.run import PluginFiles, registry_for, with_trainer
from shiftproof.benchmark.errors import InputError

data_app = typer.Typer(help="Say which files a stream needs; check and prepare them.", rich_markup_mode=None)
StreamName = Annotated[str, typer.Argument(metavar="STREAM")]
Root = Annotated[Path | None, typer.Option("--root", envvar="SHIFTPROOF_DATA", help="Folder with the data.")]


def new_strategy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case words joined by '-'.")],
    into: Annotated[Path, typer.Option("--into", help="Folder to make the package in.")] = Path(),
) -> None:
    """Write a package with a strategy of that name, its config, entry point and tests."""
    from shiftproof.benchmark.cli.scaffold import write_package

    taken = catalogue().items("strategy")
    if name in taken:
        raise InputError(f"expected a new name, got {name!r}, which {taken[name][1].label} has; choose another")
    folder = write_package(name, into)
    typer.echo(f"wrote: {folder}\nnext: pip install -e {folder} && shiftproof check {name}")


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A strategy.")],
    plugin: PluginFiles = [],  # noqa: B006
) -> None:
    """Run the conformance kit on a strategy; exit with 1 if it does not pass."""
    known = catalogue()
    registry = registry_for(known, {"strategy": with_trainer([name], known)}, plugin)

    from shiftproof.benchmark.conformance import check_strategy

    results = check_strategy(name, registry=registry)
    rows = [[result.name, "ok" if result.passed else "failed", result.detail] for result in results]
    print_table(["check", "result", "detail"], rows)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


def doctor() -> None:
    """Look at everything that a run depends on; exit with 1 if something is broken."""
    from shiftproof.benchmark.cli.doctor import examine

    findings = examine()
    print_table(["what", "state", "detail"], [[finding.what, finding.state, finding.detail] for finding in findings])
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


@data_app.command()
def status(stream: StreamName, root: Root = None) -> None:
    """List the files a stream needs, which of them are there, and where they come from."""
    facts = catalogue().item("stream", stream).facts
    if not facts["files"]:
        typer.echo(f"{stream}: needs no files, its data comes with the package")
    else:
        missing = missing_files(facts["files"], root)
        absent = "missing" if root else "unknown, no --root given"
        print_table(["file", "state"], [[file, absent if file in missing else "present"] for file in facts["files"]])
    _print_origin(facts)


@data_app.command()
def prepare(stream: StreamName, root: Root = None) -> None:
    """Build a stream once, which checks its files by size and hash and fills the cache."""
    known = catalogue()
    facts = known.item("stream", stream).facts
    missing = missing_files(facts["files"], root)
    if missing:
        where = f"below {root}" if root else "below a folder named with --root"
        raise InputError(f"expected {', '.join(missing)} {where}, got none; source: {facts['reference']} ({facts['licence']})")
    spec = registry_for(known, {"stream": [stream]}).stream(stream)
    built = spec.build(spec.config(), str(root) if root else None)
    for part, sizes in built.counts().items():
        typer.echo(f"{part}: {sum(sizes.values())} samples in {len(sizes)} sets")
    typer.echo(f"split sha256: {built.split_sha256}\ndata sha256: {built.data_sha256}")


def missing_files(files: Sequence[str], root: Path | None) -> list[str]:
    """Those of the files that do not lie below the folder."""
    return [file for file in files if root is None or not (root / file).exists()]


def _print_origin(facts: dict[str, Any]) -> None:
    typer.echo(f"source: {facts['reference']}\nlicence: {facts['licence']}")
