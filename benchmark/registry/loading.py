"""Import one plugin and read what it contributes. Whatever is wrong with it ends in one line that names it."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from shiftproof.benchmark import hookspecs
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import KINDS, did_you_mean
from shiftproof.benchmark.registry.discovery import Entry
from shiftproof.benchmark.registry.specs import Spec, check_spec

HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("shiftproof_"))
_MARK = "shiftproof_impl"  # where pluggy's HookimplMarker("shiftproof") leaves its options
_PATH = re.compile(r"(?<![\w/:.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/'\":()]+)+[\\/]")


class PluginError(InputError):
    """A plugin that cannot be used.

    Attributes:
        entry: Which one.
        reason: One line without absolute paths.
    """

    def __init__(self, entry: Entry, reason: str) -> None:
        super().__init__(f"{entry} cannot be used: {reason}")
        self.entry = entry
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Loaded:
    """A plugin that was imported and checked.

    Attributes:
        hooks: Names of the hooks it implements.
        specs: What it contributes, by kind.
        calls: Calls its hooks, and nobody else's.
    """

    entry: Entry
    hooks: tuple[str, ...]
    specs: dict[str, tuple[Spec, ...]]
    calls: Any


def load_entry(entry: Entry) -> Loaded:
    """Import an installed plugin.

    Raises:
        PluginError: If it fails in any way; other plugins are none the worse for it.
    """
    return _guarded(entry, lambda: _resolve(entry.value))


def load_file(path: Path) -> Loaded:
    """Execute a loose file as a plugin. Any process that loads the same path gets the same module name.

    Raises:
        InputError: If there is no such file.
        PluginError: If it fails in any way.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is not there"
        raise InputError(f"expected a Python file as plugin, got {path}, which {reason}; name a file like my_method.py")
    if not path.stem.isidentifier() or path.suffix != ".py":
        raise InputError(f"expected a plugin file named like my_method.py, got {path.name}; rename it")
    name = f"shiftproof_loose_{path.stem}"
    return _guarded(Entry(path.stem, name, path.name, "loose file"), lambda: _execute(name, path))


def _resolve(value: str) -> object:
    module, _, attribute = value.partition(":")
    plugin: object = import_module(module)
    for part in attribute.split(".") if attribute else ():
        plugin = getattr(plugin, part)
    return plugin


def _execute(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and inspect look the module up while it is being executed
    try:
        # Compiled here, since the loader would leave bytecode beside the user's file and trust its time to the second.
        exec(compile(path.read_bytes(), str(path.resolve()), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _guarded(entry: Entry, get: Callable[[], object]) -> Loaded:
    try:
        plugin = get()
        hooks = _hooks_of(plugin)
        manager = pluggy.PluginManager("shiftproof")
        manager.add_hookspecs(hookspecs)
        manager.register(plugin)
        specs = {kind: _contributions(kind, manager) for kind in KINDS}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's code may raise anything, also at import
        raise PluginError(entry, one_line(error)) from error
    return Loaded(entry, hooks, specs, manager.hook)


def _hooks_of(plugin: object) -> tuple[str, ...]:
    """The hooks a plugin implements; pluggy would pass over a function that is misspelt or lacks its mark."""
    found = []
    for name in dir(plugin):
        value = getattr(plugin, name, None)
        if not inspect.isroutine(value) or hasattr(value, "shiftproof_spec"):
            continue
        options = getattr(value, _MARK, None)
        if options is None and not name.startswith("shiftproof_"):
            continue
        hook = (options or {}).get("specname") or name
        if hook not in HOOKS:
            raise InputError(f"expected the name of a hook, got {hook!r}{did_you_mean(hook, HOOKS)}")
        if options is None:
            raise InputError(f"expected {hook} to be marked as a hook; write @hookimpl above it")
        found.append(hook)
    if not found:
        raise InputError(f"expected at least one hook, got none; write one of {', '.join(HOOKS[:3])} ...")
    return tuple(found)


def _contributions(kind: str, manager: pluggy.PluginManager) -> tuple[Spec, ...]:
    hook = f"shiftproof_{KINDS[kind]}"
    specs = []
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        answer = implementation.function()  # pluggy's own call drops None: a forgotten `return` would pass unseen
        if isinstance(answer, str) or not hasattr(answer, "__iter__"):
            raise InputError(f"expected {hook} to return a list of specs, got {answer!r}")
        specs += [check_spec(kind, spec) for spec in answer]
    return tuple(specs)


def one_line(error: BaseException) -> str:
    """An error in one line, with its type unless it is ours, its place in the plugin, and no absolute path."""
    message = " ".join(str(error).split())
    if isinstance(error, InputError):
        return _PATH.sub("", message)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return _PATH.sub("", f"{type(error).__name__}: {message}{'' if isinstance(error, SyntaxError) else place}")
