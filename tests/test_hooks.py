"""Every hook is called, is tested under its own name, and is documented word for word."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark import hookspecs
from shiftproof.benchmark.registry.loading import HOOKS
from shiftproof.benchmark.registry.lookup import Registry, load_registry

ROOT = Path(__file__).parent.parent

CONTRIBUTION = """
from dataclasses import dataclass
from shiftproof.benchmark import *

@dataclass(frozen=True)
class Config:
    pass

def build(*arguments):
    return arguments

@hookimpl
def {hook}():
    yield {spec}
"""

OBSERVER = """
from shiftproof.benchmark import hookimpl

told = []

@hookimpl
def {hook}({arguments}):
    told.append(({arguments}))
"""


def test_every_hook_has_a_test_of_its_name() -> None:
    trees = [ast.parse(file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")]
    tests = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [hook for hook in HOOKS if not any(name.startswith(f"test_{hook}") for name in tests)] == []


def test_every_signature_stands_word_for_word_in_the_readme_of_the_plugins() -> None:
    source, readme = inspect.getsource(hookspecs), (ROOT / "plugins/README.md").read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == list(HOOKS)
    assert [function.name for function in functions if signature(source, function) not in readme] == []


def test_the_strategy_in_the_readme_registers_as_printed(tmp_path: Path) -> None:
    readme = (ROOT / "plugins/README.md").read_text()
    (tmp_path / "my_method.py").write_text(readme.split("```python\n")[1].split("```")[0])
    spec, _, config = load_registry([], [tmp_path / "my_method.py"]).strategy("smooth")
    assert (config.smoothing, spec.consumes.__name__) == (0.1, "DataExperience")


def signature(source: str, function: ast.FunctionDef) -> str:
    """From `def` to the colon, without the comment behind it."""
    lines = source.splitlines()[function.lineno - 1 : function.body[0].lineno - 1]
    return "\n".join(lines).split("  #")[0]


def contributed(folder: Path, hook: str, spec: str) -> Registry:
    file = folder / "contributor.py"
    file.write_text(CONTRIBUTION.format(hook=hook, spec=spec))
    return load_registry([], [file])


def told(folder: Path, hook: str, arguments: str) -> tuple[Registry, list[Any]]:
    file = folder / "observer.py"
    file.write_text(OBSERVER.format(hook=hook, arguments=arguments))
    registry = load_registry([], [file])
    (loaded,) = (loaded for loaded in registry.observers.plugins if loaded.entry.name == "observer")
    (implementation,) = getattr(loaded.calls, hook).get_hookimpls()
    return registry, implementation.plugin.told


def test_shiftproof_strategies_contributes_strategies(tmp_path: Path) -> None:
    spec = "StrategySpec('mine', build, Config, DataExperience, 'Me, 2026')"
    assert contributed(tmp_path, "shiftproof_strategies", spec).strategy("mine")[0].reference == "Me, 2026"


def test_shiftproof_streams_contributes_streams(tmp_path: Path) -> None:
    spec = "StreamSpec('mine', build, Config, 'digits', 'a stream', 'Me, 2026', 'CC0')"
    assert contributed(tmp_path, "shiftproof_streams", spec).stream("mine").licence == "CC0"


def test_shiftproof_suites_contributes_suites(tmp_path: Path) -> None:
    spec = "SuiteSpec('mine', 'a suite', ('b-digits',), ('sgd',))"
    assert contributed(tmp_path, "shiftproof_suites", spec).suite("mine").seeds == (0, 1, 2)


def test_shiftproof_metrics_contributes_metrics(tmp_path: Path) -> None:
    spec = "MetricSpec('mine', build, True, 'a mean')"
    assert contributed(tmp_path, "shiftproof_metrics", spec).metric("mine").definition == "a mean"


def test_shiftproof_backbones_contributes_backbones(tmp_path: Path) -> None:
    spec = "BackboneSpec('mine', build, 'a net', 'Me, 2026')"
    assert contributed(tmp_path, "shiftproof_backbones", spec).backbone("mine").description == "a net"


def test_shiftproof_executors_contributes_executors(tmp_path: Path) -> None:
    spec = "ExecutorSpec('mine', build, 'a way')"
    assert contributed(tmp_path, "shiftproof_executors", spec).executor("mine").build() == ()  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("request_", ["a request"])
def test_shiftproof_run_started_tells_the_request(tmp_path: Path, request_: Any) -> None:
    registry, heard = told(tmp_path, "shiftproof_run_started", "request")
    registry.observers.run_started(request_)
    assert heard == ["a request"]


@pytest.mark.parametrize("request_", ["a request"])
def test_shiftproof_experience_learned_tells_name_logs_and_counts(tmp_path: Path, request_: Any) -> None:
    registry, heard = told(tmp_path, "shiftproof_experience_learned", "request, experience, logs, row")
    registry.observers.experience_learned(request_, "even", {"loss": 0.5}, [[(3, 4), (1, 4)]])
    assert heard == [("a request", "even", {"loss": 0.5}, [[(3, 4), (1, 4)]])]


@pytest.mark.parametrize("record", ["a record"])
def test_shiftproof_run_finished_tells_the_record(tmp_path: Path, record: Any) -> None:
    registry, heard = told(tmp_path, "shiftproof_run_finished", "record")
    registry.observers.run_finished(record)
    assert heard == ["a record"]
