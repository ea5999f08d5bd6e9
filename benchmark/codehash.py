"""The code behind a strategy as a hash: what it does, not how it is commented."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType

HARNESS = "shiftproof.benchmark"  # covered by PROTOCOL_VERSION alone


def code_sha256(module: str) -> str:
    """Hash over the syntax trees, without docstrings and comments, of a module and of what it imports.

    Followed are modules of the same top-level package and of `shiftproof.strategies`, also through a package facade: a name
    that a package re-exports counts as the module that defines it. The harness is left out.
    """
    digest = hashlib.sha256()
    for name in sorted(_closure(module)):
        digest.update(f"{_relative(name, module)}\n{_normalized(name)}\n".encode())
    return digest.hexdigest()


def _relative(name: str, root: str) -> str:
    """A loose file keeps its hash whatever name it was loaded under."""
    return "<root>" if name == root else name


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        queue += [found for found in _imports(name) if _followed(found, module)]
    return seen


def _followed(name: str, root: str) -> bool:
    if name == HARNESS or name.startswith(f"{HARNESS}."):
        return False
    top = root.split(".")[0]
    return name.split(".")[0] in (top, "shiftproof") and _source(name) is not None


def _source(name: str) -> str | None:
    module = sys.modules.get(name) or _imported(name)
    if module is None:
        return None
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return None


def _imported(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(_source(name) or "")


def _imports(name: str) -> Iterator[str]:
    """Full names of the modules that a module imports from anywhere in its code."""
    package = name if hasattr(sys.modules.get(name), "__path__") else name.rpartition(".")[0]
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from (_home(base, alias.name) for alias in node.names)


def _home(module: str, name: str) -> str:
    """The module that defines `name` as imported from `module`: a submodule, or where a facade took it from."""
    if not module.startswith("shiftproof.") and module.split(".")[0] not in sys.modules:
        return module
    holder = _imported(module)
    value = getattr(holder, name, None)
    if isinstance(value, ModuleType):
        return value.__name__
    return getattr(value, "__module__", None) or module


def _normalized(name: str) -> str:
    """The dumped syntax tree without docstrings."""
    tree = ast.parse(_source(name) or "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                node.body = node.body[1:]
    return ast.dump(tree)
