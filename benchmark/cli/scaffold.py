"""`shiftproof new-strategy`: a package with a strategy that runs, to be changed into one's own."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from string import Template

from shiftproof.benchmark.cli.scaffold_templates import FILES
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import SCOPES

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""Narrower than what a strategy may be called: a package and a class are named after it."""

LONGEST = 80
"""Characters of a name: folders and files are named after it, which may have 255."""


def write_package(name: str, into: Path) -> Path:
    """Write the package `shiftproof-NAME` into a folder, all of it or nothing.

    Args:
        name: Of the strategy.
        into: Folder to make the package in; made if it is not there.

    Returns:
        The package's folder.

    Raises:
        InputError: If the name cannot be one, the package's folder exists, or it cannot be written.
    """
    if name in SCOPES:
        raise InputError(f"expected a name that is no scope of --set, got {name!r}; choose another")
    if len(name) > LONGEST:
        raise InputError(f"expected a name of at most {LONGEST} characters, got {len(name)}; choose a shorter one")
    if not NAME.fullmatch(name):
        raise InputError(f"expected a name in lower-case words joined by '-', such as my-method, got {name!r}")
    target = into / f"shiftproof-{name}"
    temporary = None
    try:
        if target.exists():
            raise InputError(f"expected a new folder, got {target}, which exists; choose another name or remove it")
        into.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=into, prefix=".new-strategy-"))
        for path, text in package_files(name).items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"expected to write into {into}, got: {error.strerror}; name another folder with --into") from error
    return target


def package_files(name: str) -> dict[str, str]:
    """The text of every file of the package, by path."""
    values = {
        "name": name,
        "module": f"shiftproof_{name.replace('-', '_')}",
        "short": name.replace("-", "_"),
        "cls": "".join(word.capitalize() for word in name.split("-")),
    }
    return {Template(path).substitute(values): Template(text).substitute(values) for path, text in FILES.items()}
