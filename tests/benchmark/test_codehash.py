"""The hash of a strategy's code: what it does counts, not how it is written down, nor where."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, invalidate_caches, reload
from pathlib import Path

import pytest

from shiftproof.benchmark.codehash import code_sha256, module_of, plugin_sha256
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.registry.loading import load_file

STRATEGY = '''
"""A method."""
from shiftproof.benchmark import RunContext
from shiftproof.strategies import TrainingStrategy
from pack.helpers import scaled

class Method(TrainingStrategy):
    """Docstring."""

    rate: float = 0.5
    "what the rate is"

    def loss(self, batch):
        """Another one."""
        return scaled(batch, -1) + self.rate  # a comment
'''
HELPERS = """
from .constants import FACTOR

def scaled(x, y):
    return FACTOR * x if y is None else x - y
"""
PACKAGE = {"__init__": "", "method": STRATEGY, "helpers": HELPERS, "constants": "FACTOR = 2"}

Hash = Callable[..., str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hash]:
    """Write the package `pack`, import it anew, and hash `pack.method`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # bytecode trusts times to the second
    (tmp_path / "pack").mkdir()

    def make(**sources: str) -> str:
        forget()
        for name, source in (PACKAGE | sources).items():
            (tmp_path / "pack" / f"{name}.py").write_text(source)
        invalidate_caches()
        import_module("pack.method")
        return code_sha256("pack.method")

    yield make
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
        del sys.modules[name]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Hash]:
    """Load a loose file with this source under this name, and hash it."""
    loaded = set(sys.modules)

    def make(source: str, name: str = "method") -> str:
        path = tmp_path / f"{name}.py"
        hook = "\nfrom shiftproof.benchmark import hookimpl\n@hookimpl\ndef shiftproof_suites():\n    return []\n"
        path.write_text(source + hook)
        load_file(path)
        return code_sha256(f"shiftproof_loose_{name}")

    yield make
    for name in set(sys.modules) - loaded:
        if name.startswith("shiftproof_loose_"):
            del sys.modules[name]


SOURCE = "def f(x, *, y=1):\n    return [x + y, f'{x!r:>{y}}']\n"


@pytest.mark.parametrize(
    "source",
    [
        "# a comment\ndef f(x, *, y=1):  # here, too\n    return [x + y, f'{x!r:>{y}}']\n",
        'def f(x, *, y=1):\n    """What it does."""\n    return [x + y, f\'{x!r:>{y}}\']\n',
        '"""Module."""\ndef f(\n    x,\n    *,\n    y=1,\n):\n    return [\n        (x + y),\n        f"{x!r:>{y}}",\n    ]\n',
        SOURCE + '"""A string after the last statement."""\n',
    ],
    ids=["comments", "docstring", "formatting", "stray string"],
)
def test_comments_docstrings_and_formatting_do_not_count(alone: Hash, source: str) -> None:
    assert alone(source) == alone(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x + y", "x - y"),
        ("y=1", "y=2"),
        ("def f(", "def g("),
        ("!r", "!s"),
        ("'{x", "'a{x"),
        ("*, y", "y"),
        ("[x", "[None, x"),
    ],
)
def test_everything_else_counts(alone: Hash, old: str, new: str) -> None:
    assert old in SOURCE
    assert alone(SOURCE.replace(old, new)) != alone(SOURCE)


def test_a_loose_file_has_the_same_hash_under_another_name(alone: Hash) -> None:
    strategy = STRATEGY.replace("from pack.helpers import scaled\n", "")
    assert alone(strategy, "method") == alone(strategy, "zebra") == alone(strategy, "aardvark")


def test_a_loose_file_that_was_edited_and_loaded_again_has_another_hash(alone: Hash) -> None:
    before = alone(SOURCE)
    assert alone(SOURCE.replace("x + y", "x * y")) != before
    assert alone(SOURCE) == before


EDITS = [
    {"method": STRATEGY.replace("-1", "+1")},
    {"method": STRATEGY.replace("0.5", "0.6")},
    {"helpers": HELPERS.replace("x - y", "x + y")},
    {"constants": "FACTOR = 3"},
]


@pytest.mark.parametrize("edit", EDITS, ids=["operator", "default", "helper", "helper of the helper"])
def test_an_edit_in_the_module_and_in_all_that_it_imports_counts(package: Hash, edit: dict[str, str]) -> None:
    before = package()
    assert package(**edit) != before
    assert package() == before


def test_modules_of_the_package_that_are_not_imported_do_not_count(package: Hash) -> None:
    assert package(other="x = 1") == package(other="x = 2") == package()


def test_what_runs_is_hashed_although_its_file_was_edited_meanwhile_until_it_is_loaded_again(package: Hash) -> None:
    before = package()
    Path(import_module("pack.helpers").__file__ or "").write_text(HELPERS.replace("x - y", "x + y"))
    assert code_sha256("pack.method") == before
    reload(sys.modules["pack.helpers"])
    assert code_sha256("pack.method") != before


LAZY_FACADE = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from pack.other import thing
def __getattr__(name):
    from importlib import import_module
    return getattr(import_module(__name__ + ".helpers"), name)
"""


def test_a_name_from_a_facade_is_followed_to_the_module_that_defines_it_and_no_further(package: Hash) -> None:
    facade = {"__init__": LAZY_FACADE, "method": "from pack import scaled\n"}
    before = package(**facade, other="thing = 1")
    assert package(**facade, helpers=HELPERS.replace("x - y", "x + y")) != before
    assert package(**facade, other="thing = 2") == before


def test_an_object_counts_where_it_is_made_not_where_its_class_is(package: Hash) -> None:
    facade = {"__init__": "from pack.values import DEFAULT\n", "method": "from pack import DEFAULT\n"}
    values = "from functools import partial\nDEFAULT = partial(int, {})\n"
    assert package(**facade, values=values.format(1)) != package(**facade, values=values.format(2))


def test_the_harness_does_not_count(alone: Hash, monkeypatch: pytest.MonkeyPatch) -> None:
    from shiftproof.benchmark import codehash

    strategy = "from shiftproof.benchmark.context import RunContext\nfrom shiftproof.benchmark import Model\n"
    before = alone(strategy)
    monkeypatch.setitem(codehash._sources, "shiftproof.benchmark.context", (None, "x = 1"))
    assert code_sha256("shiftproof_loose_method") == before
    assert plugin_sha256("shiftproof.benchmark.backbones") == ""
    assert plugin_sha256("shiftproof_loose_method") == before


def test_built_in_parts_that_a_stranger_builds_on_do_count(alone: Hash) -> None:
    from shiftproof.benchmark import codehash

    alone("from shiftproof.strategies import TrainingStrategy\n")
    followed = codehash._closure("shiftproof_loose_method")
    assert {"shiftproof.strategies.training", "shiftproof.strategies.state"} <= followed
    assert not {name for name in followed if name.startswith("shiftproof.benchmark")}
    assert "shiftproof.strategies.clustering" not in followed  # only the facade names it


class Builder:
    def __call__(self, config: object, context: object) -> None: ...


def build(config: object, context: object, kind: int = 0) -> None: ...


@pytest.mark.parametrize(
    "made", [Builder, Builder(), build, partial(build, kind=1), partial(partial(build, kind=1), kind=2), lambda a, b: None]
)
def test_the_module_of_what_builds_a_strategy_is_found_through_partials_and_objects(made: Callable[..., object]) -> None:
    assert module_of(made) == __name__


def test_code_without_a_file_is_refused() -> None:
    with pytest.raises(InputError, match="expected the strategy's code in a file, got module 'itertools'"):
        code_sha256("itertools")
