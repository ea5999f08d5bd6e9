"""Which plugins are installed and which files they consist of, without importing any of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path

from shiftproof.benchmark.names import unknown

GROUP = "shiftproof"
LIMIT = "SHIFTPROOF_PLUGINS"
ESSENTIAL = ("shiftproof.benchmark.backbones", "shiftproof.benchmark.metrics", "shiftproof.benchmark.running.executors")


@dataclass(frozen=True)
class Entry:
    """One plugin as its distribution announces it: an entry point of the group `shiftproof`.

    Attributes:
        value: Module, or "module:object" where an object carries the hooks.
    """

    name: str
    value: str
    distribution: str
    version: str

    @property
    def module(self) -> str:
        """The module to import."""
        return self.value.partition(":")[0]

    @property
    def is_essential(self) -> bool:
        """True for the harness's own parts, without which nothing runs."""
        return self.value in ESSENTIAL

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


def installed_entries(only: Iterable[str] | None = None) -> list[Entry]:
    """Every plugin to load, the harness's own first, then by name.

    Args:
        only: Names of entry points; None for all. `SHIFTPROOF_PLUGINS=a,b` in the environment limits them further.

    Raises:
        InputError: If a name is not installed.
    """
    found = [
        Entry(e.name, e.value, e.dist.name if e.dist else "unknown", e.dist.version if e.dist else "0")
        for e in entry_points(group=GROUP)
    ]
    found.sort(key=lambda entry: (not entry.is_essential, entry.name, entry.distribution))
    limits = [limit for limit in (None if only is None else set(only), _limit_of_environment()) if limit is not None]
    for limit in limits:
        _refuse_unknown(limit, found)
    return [entry for entry in found if entry.is_essential or all(entry.name in limit for limit in limits)]


def _limit_of_environment() -> set[str] | None:
    names = {name.strip() for name in os.environ.get(LIMIT, "").split(",")} - {""}
    return names or None


def _refuse_unknown(limit: set[str], found: list[Entry]) -> None:
    known = {entry.name for entry in found}
    for name in sorted(limit - known):
        raise unknown("plugin", name, known, f"; {LIMIT} and the installed packages decide which there are")


def fingerprint(module: str) -> list[int] | None:
    """What changes when a plugin is edited: number, sizes and times of its source files; None where there is no file.

    A plugin is its file; where it lies in a package of its own, every source file of that package counts.
    """
    spec = find_spec(module)
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    origin = Path(spec.origin)
    is_package = spec.submodule_search_locations is not None
    shares_folder = module.startswith("shiftproof.") or "." not in module
    files = [origin] if shares_folder and not is_package else sorted(origin.parent.rglob("*.py"))
    stats = [file.stat() for file in files]
    return [len(stats), sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)]


def find_spec(module: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, but without importing parent packages, which may be heavy."""
    spec, path, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = _ask_finders(name, path)
        if spec is None:
            return None
        try:
            path = list(spec.submodule_search_locations or ())
        except KeyError:  # a namespace package inside a package that was never imported does not tell its folders
            return None
    return spec


def _ask_finders(name: str, path: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path)
        if spec is not None:
            return spec
    return None
