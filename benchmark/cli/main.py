"""The command `shiftproof`. Each room of commands is a module beside this one; nothing here imports torch."""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperCommand, TyperGroup

    from shiftproof.benchmark.cli import analyze, board, experts, facts, merge, run, tools, transport
    from shiftproof.benchmark.errors import InputError, Terminated
except KeyboardInterrupt:  # most of a short command's time goes into these, and nobody wants to see where
    print("stopped", file=sys.stderr)
    sys.exit(130)

# Typer exports of its usage errors only this one; the parent covers unknown options and commands too.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _AsTyped:
    """In place of what Typer makes of a parameter's type."""

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        return value


def _light(params: list[Any]) -> list[Any]:
    """Spare strings and flags the models of pydantic, whose import is a third of the time in which `list` must answer."""
    for param in params:
        param._runtime_param = _AsTyped()  # a Typer without this attribute is slower and does the same
    return params


class LightCommand(TyperCommand):
    """A command whose parameters are strings and flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters."""
        return _light(super().get_params(ctx))


class OneLineErrors(TyperGroup):
    """Turns whatever a user can mend into one line on standard error and exit code 2."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options before the command, all of them flags."""
        return _light(super().get_params(ctx))

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the options before the command."""
        with _one_line(None):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _one_line(ctx: Any) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        if ctx is not None and ctx.params.get("debug"):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo("stopped; finished cells are kept, the same command goes on from here", err=True)
        raise typer.Exit(143 if isinstance(error, Terminated) else 130) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            told = f"expected a path, got {str(error.filename)[:40]!r}...: {error.strerror}; give a shorter one"
        elif error.errno == errno.ENOSPC:
            _give_up_output()
            told = f"expected to write, got: {error.strerror}; free space or write elsewhere"
        else:  # a reader who has left is Typer's business
            raise
        typer.echo(f"error: {told}", err=True)
        raise typer.Exit(2) from error
    except _UsageError as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "shiftproof")
        told = f"{error.format_message().rstrip('.')}{_came(error)}"  # type: ignore[attr-defined]
        typer.echo(f"error: {told}; see {where} --help", err=True)
        raise typer.Exit(2) from error


def _came(error: Exception) -> str:
    """The value that a parameter was given, which pydantic keeps and Typer does not tell."""
    errors = getattr(error.__cause__, "errors", None)
    return f", got {errors()[0]['input']!r}" if errors else ""


def _give_up_output() -> None:
    """What could not be written would be written again, and fail again, when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Plain help and plain tracebacks: rich ones cost half the time that `--help` may take.
app = typer.Typer(name="shiftproof", cls=OneLineErrors, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Benchmark suite for learning strategies that must hold up when data shifts."""
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"shiftproof {installed_version('shiftproof')}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command("run")(run.run)
app.command("merge")(merge.merge)
app.command("transport")(transport.transport)
app.command("list", cls=LightCommand)(facts.list_names)
app.command("show", cls=LightCommand)(facts.show)
app.command("plugins", cls=LightCommand)(facts.plugins)
app.command("new-strategy")(tools.new_strategy)
app.command("check")(tools.check)
app.command("doctor")(tools.doctor)
app.add_typer(tools.data_app, name="data")
app.add_typer(board.app, name="leaderboard")
app.add_typer(analyze.app, name="analyze")
app.add_typer(experts.app, name="experts")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
    try:
        app()
    except KeyboardInterrupt:  # before the command, or after it
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if "triton" not in sys.modules:  # it complains of what was not cleared
            gc.freeze()  # or the end looks for garbage among all that torch has made, which takes a third of a second
