"""Kinds of things that plugins contribute, how they may be called, and what to say when a name is unknown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from shiftproof.benchmark.errors import InputError

KINDS = {
    "strategy": "strategies",
    "stream": "streams",
    "suite": "suites",
    "metric": "metrics",
    "backbone": "backbones",
    "executor": "executors",
}
"""Singular to plural; the plural is the hook's name after `shiftproof_` and the argument of `shiftproof list`."""

NAME = re.compile(r"[a-z][a-z0-9+]*(-[a-z0-9+]+)*")
"""Lower-case words joined by '-'. '@', '.', '=' and ',' have a meaning on the command line; '+' is for names such as der++."""

SCOPES = ("stream", "recipe", "base")
"""Scopes of overrides beside the strategies' own names; no strategy may be called so."""

LISTED = 40  # names that an error lists at most


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest spelling as a question, or nothing where no known name is near.

    >>> did_you_mean("gama", ["gamma", "clusters"])
    "; did you mean 'gamma'?"
    """
    nearest = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """What to raise for a name that nothing is registered under.

    Args:
        kind: What was looked for, in words.
        known: Every name that would have been right; the error lists them unless they are too many for a line.
        hint: One more sentence for the end, where no known name is near.
    """
    names = sorted(known)
    command = f"`shiftproof list {KINDS.get(kind, 'KIND')}` names all that are known"
    listed = f"known: {', '.join(names) or 'none'}" if len(names) <= LISTED else command
    article = "an" if kind[0] in "aeiou" else "a"
    question = did_you_mean(name, names)
    return InputError(f"expected the name of {article} {kind}, got {name!r}{question} ({listed}){'' if question else hint}")


def conflict(kind: str, name: str, first: str, second: str) -> InputError:
    """What to raise when two plugins contribute one name."""
    return InputError(
        f"expected one plugin for the {kind} {name!r}, got two: {first} and {second}; "
        "rename one, uninstall one, or name the plugins to load in SHIFTPROOF_PLUGINS"
    )


def problems_hint(problems: Mapping[str, str]) -> str:
    """What to add to the error for an unknown name while plugins are broken: it may be in one of them.

    Args:
        problems: Plugin to what is wrong with it.
    """
    if len(problems) > 1:
        return f"; {len(problems)} plugins did not load: {', '.join(sorted(problems))}; `shiftproof plugins` says why"
    return "".join(f"; plugin {name!r} did not load: {error}" for name, error in problems.items())
