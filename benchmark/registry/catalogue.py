"""Names and facts of all plugins without importing them: harvested in a child process, kept in the cache folder.

Knowing names means importing plugins, and plugins import torch. So one child process imports those that changed since the last
harvest and writes down what they say about themselves; `list`, `show` and `plugins` read what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.folders import cache_folder
from shiftproof.benchmark.names import KINDS, conflict, problems_hint, unknown
from shiftproof.benchmark.registry.discovery import Entry, fingerprint, installed_entries

FORMAT = 1  # raised when rows look different
READERS = ("shiftproof.benchmark.contracts", "shiftproof.benchmark.registry.harvest")
OURS = ("shiftproof.benchmark", "shiftproof.strategies", "shiftproof.plugins")
TIMEOUT = 120.0  # seconds for one child process

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Item:
    """One contribution: what a spec says about itself, as JSON values."""

    kind: str
    name: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plugin:
    """One plugin's row.

    Attributes:
        status: "ok", or "broken" with the reason in `error`.
        hooks: Which hooks it implements.
    """

    name: str
    distribution: str
    version: str
    status: Literal["ok", "broken"]
    error: str
    hooks: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Catalogue:
    """Every plugin's row, in the order in which plugins are loaded."""

    plugins: tuple[Plugin, ...]

    @property
    def broken(self) -> dict[str, str]:
        """Reason for every plugin that does not load."""
        return {plugin.name: plugin.error for plugin in self.plugins if plugin.status == "broken"}

    def items(self, kind: str) -> dict[str, tuple[Item, Plugin]]:
        """Everything of one kind by name, with the plugin it comes from.

        Raises:
            InputError: If two plugins contribute one name.
        """
        found: dict[str, tuple[Item, Plugin]] = {}
        for item, plugin in self._all(kind):
            if item.name in found:
                raise conflict(kind, item.name, found[item.name][1].label, plugin.label)
            found[item.name] = (item, plugin)
        return dict(sorted(found.items()))

    def item(self, kind: str, name: str) -> Item:
        """One item.

        Raises:
            InputError: If there is none, with the nearest spelling and the plugins that might have had it.
        """
        items = self.items(kind)
        if name not in items:
            raise unknown(kind, name, items, problems_hint(self.broken))
        return items[name][0]

    def conflicts(self) -> list[str]:
        """One line for every name that several plugins contribute."""
        lines = []
        for kind in KINDS:
            try:
                self.items(kind)
            except InputError as error:
                lines.append(str(error))
        return lines

    def providers(self, names: Mapping[str, Iterable[str]]) -> set[str]:
        """Entry points to import for the given names by kind; names that are in no plugin are passed over."""
        wanted = {(kind, name) for kind, listed in names.items() for name in listed}
        return {plugin.name for kind in names for item, plugin in self._all(kind) if (kind, item.name) in wanted}

    def with_hook(self, hooks: Iterable[str]) -> set[str]:
        """Entry points that implement one of the hooks."""
        wanted = set(hooks)
        return {plugin.name for plugin in self.plugins if wanted & set(plugin.hooks)}

    def _all(self, kind: str) -> Iterator[tuple[Item, Plugin]]:
        return ((item, plugin) for plugin in self.plugins for item in plugin.items if item.kind == kind)


def read_catalogue(refresh: bool = False) -> Catalogue:
    """The catalogue of every installed plugin; only those that changed since the last call are imported, in a child process.

    Args:
        refresh: Import them all.

    Raises:
        InputError: If the cache folder cannot be written, or `SHIFTPROOF_PLUGINS` names a plugin that is not installed.
    """
    entries = installed_entries()
    path = _file()
    rows = _read(path)
    if refresh or _stale(entries, rows):
        rows = _update(path, entries, refresh)
    return Catalogue(tuple(_plugin(entry, rows[str(entry)]) for entry in entries))


def _update(path: Path, entries: list[Entry], refresh: bool) -> Rows:
    from shiftproof.benchmark.records import write_atomically

    with _locked(path.with_suffix(".lock")):
        rows = _read(path)
        stale = entries if refresh else _stale(entries, rows)
        keys = _keys(stale)  # taken before: an edit during the harvest is seen next time
        for name, row in _harvest(stale).items():
            rows[name] = {**row, "key": keys[name], "around": _around(row)}
        write_atomically(path, json.dumps({"format": FORMAT, "plugins": rows}, indent=1, sort_keys=True))
    return rows


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock  # 0.05 s that a warm catalogue need not pay

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        reason = f"expected a cache folder that can be written, got {cache_folder()}: {error.strerror}"
        raise InputError(f"{reason}; name another one in SHIFTPROOF_CACHE") from error
    try:
        yield
    finally:
        lock.release()


def _file() -> Path:
    """Several environments share a cache folder; a hash keeps them apart without telling where they lie."""
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    return cache_folder() / "catalogue" / f"{environment}.json"


def _read(path: Path) -> Rows:
    try:
        content = json.loads(path.read_text())
        return dict(content["plugins"]) if content["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # absent or damaged: everything is harvested again, and who cannot write what comes of it is told


def _stale(entries: Sequence[Entry], rows: Rows) -> list[Entry]:
    keys = _keys(entries)

    def is_fresh(entry: Entry) -> bool:
        row = rows.get(str(entry), {})
        return row.get("key") == keys[str(entry)] and row["around"] == _around(row)

    return [entry for entry in entries if not is_fresh(entry)]


def _keys(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """What the row of each plugin is valid for: its files and the code that reads them."""
    readers = [version("shiftproof"), *(fingerprint(module) for module in READERS)]
    return {str(entry): [entry.value, fingerprint(entry.module), readers] for entry in entries}


def _around(row: Mapping[str, Any]) -> list[Any]:
    """What else may change a row: packages for what misses an extra, and shiftproof itself for a plugin that is broken."""
    is_broken = row["status"] == "broken"
    if not is_broken and not any(item["facts"].get("unavailable") for item in row["items"]):
        return []
    folders = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    return [[folder.stat().st_mtime_ns for folder in folders], *(fingerprint(package) for package in OURS if is_broken)]


def _harvest(entries: list[Entry]) -> Rows:
    """Rows from one child process; from one for each plugin if an import takes the process down."""
    if not entries:
        return {}
    from tempfile import TemporaryDirectory  # as with filelock: only a harvest pays for it

    with TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        reason = _run_child(file, [str(entry) for entry in entries])
        if not reason:
            return dict(json.loads(file.read_text()))
    if len(entries) > 1:
        return {name: row for entry in entries for name, row in _harvest([entry]).items()}
    return {str(entries[0]): {"status": "broken", "error": reason, "hooks": [], "items": []}}


def _run_child(file: Path, names: list[str]) -> str:
    """Why it failed, empty if it did not."""
    import subprocess

    paths = [str(Path(path).resolve()) for path in sys.path if os.path.exists(path or ".")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "shiftproof.benchmark.registry.harvest", str(file), *names]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its import did not end within {TIMEOUT:.0f} s"
    return f"its import ended the process with status {done.returncode}" if done.returncode or not file.exists() else ""


def _plugin(entry: Entry, row: Mapping[str, Any]) -> Plugin:
    items = tuple(Item(item["kind"], item["name"], item["facts"]) for item in row["items"])
    return Plugin(entry.name, entry.distribution, entry.version, row["status"], row["error"], tuple(row["hooks"]), items)
