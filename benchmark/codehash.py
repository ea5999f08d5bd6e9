"""The code behind a strategy as a hash: what it does, not how it is commented."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

from shiftproof.benchmark.errors import InputError

HARNESS = "shiftproof.benchmark"  # covered by PROTOCOL_VERSION alone


def code_sha256(*modules: str) -> str:
    """Hash over the syntax trees, without docstrings and comments, of modules and of what they import.

    Followed are modules of the same top-level package and of `shiftproof`, also through a package facade: a name that a
    package re-exports counts as the module that defines it. The harness is left out. The hash is that of the files as they
    were when this process first asked, since it runs what it imported whatever happens to the files afterwards; a module
    that is loaded again is read again. It does not depend on the version of Python.

    Raises:
        InputError: If a module has no source code.
    """
    digest = hashlib.sha256()
    roots = list(dict.fromkeys(modules))
    for root in roots:
        if _source(root) is None:
            raise InputError(f"expected the strategy's code in a file, got module {root!r}, which has none; write it into one")
    followed = set().union(*(_closure(root) for root in roots)) - set(roots)
    # A loose file keeps its hash whatever name it was loaded under, so roots go by no name and come first.
    for name in [*roots, *sorted(followed)]:
        digest.update(f"{'<root>' if name in roots else name}\n{_normalized(_source(name) or '')}\n".encode())
    return digest.hexdigest()


def module_of(build: Callable[..., Any]) -> str:
    """The module that defines what is called: through `functools.partial`, and of an object its class."""
    while isinstance(build, partial):
        build = build.func
    return str((build if isinstance(build, type | FunctionType) else type(build)).__module__)


def plugin_sha256(module: str) -> str:
    """As `code_sha256`, but empty for a part of the harness."""
    return "" if f"{module}.".startswith(f"{HARNESS}.") else code_sha256(module)


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += [found for found in _imports(name, module.split(".")[0]) if _source(found) is not None]
    return seen


def _imports(name: str, top: str) -> Iterator[str]:
    """Full names of the modules to follow that a module imports, from anywhere in its code."""
    package = name if hasattr(sys.modules.get(name), "__path__") else name.rpartition(".")[0]
    for base, level, taken in _statements(_source(name) or ""):
        if level:
            parents = package.split(".")[: len(package.split(".")) - level + 1]
            base = ".".join([*parents, base] if base else parents)
        if _is_ours(base, top):
            homes = [_home(base, one) for one in taken] or [base]
            yield from (home for home in homes if _is_ours(home, top))


@lru_cache(maxsize=1024)
def _statements(source: str) -> list[tuple[str, int, tuple[str, ...]]]:
    """(module, level of a relative import, names taken from it) of every import."""
    found: list[tuple[str, int, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level, tuple(alias.name for alias in node.names)))
    return found


def _is_ours(name: str, top: str) -> bool:
    if name == HARNESS or name.startswith(f"{HARNESS}."):
        return False
    return name.split(".")[0] in (top, "shiftproof")


def _home(module: str, name: str) -> str:
    """Where to look for `name` as imported from `module`: in a submodule, or where a package's facade took it from."""
    holder = _imported(module)
    if not hasattr(holder, "__path__"):
        return module
    value = getattr(holder, name, None)
    if isinstance(value, ModuleType):
        return value.__name__
    # Only a class or a function says where it was defined; a constant leaves the facade itself, and all that it imports.
    return value.__module__ if isinstance(value, type | FunctionType) else module


def _imported(name: str) -> ModuleType | None:
    if name not in sys.modules:
        try:
            import_module(name)
        except ImportError:  # an optional part that is not installed
            return None
    return sys.modules.get(name)


_sources: dict[str, tuple[object, str | None]] = {}


def _source(name: str) -> str | None:
    module = _imported(name)
    if module is None:
        return None
    spec = getattr(module, "__spec__", None)  # a new one whenever a module is loaded again
    if name not in _sources or _sources[name][0] is not spec:
        try:
            _sources[name] = spec, inspect.getsource(module)
        except (OSError, TypeError):  # no file, or none with source code
            _sources[name] = spec, None
    return _sources[name][1]


@lru_cache(maxsize=1024)
def _normalized(source: str) -> str:
    return _dumped(ast.parse(source))


def _dumped(node: object) -> str:
    """A syntax tree as text, without docstrings and without the empty fields that versions of Python differ in."""
    if isinstance(node, list):
        return f"[{','.join(_dumped(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [
        f"{name}={_dumped(value)}"
        for name, value in ast.iter_fields(node)
        if value != [] and (value is not None or (isinstance(node, ast.Constant) and name == "value"))
    ]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: object) -> bool:
    """True for any string that stands by itself, be it of a module, a class, a function or an attribute."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
