"""The examples in docstrings do what they print."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmark", "strategies", "plugins", "datasets")


def modules() -> list[str]:
    """Names of the modules that have examples."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if ">>> " in path.read_text()]
    return [".".join(["shiftproof", *path.relative_to(ROOT).with_suffix("").parts]) for path in files]


@pytest.mark.parametrize("name", modules())
def test_examples_print_what_they_say(name: str) -> None:
    found = doctest.testmod(import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
