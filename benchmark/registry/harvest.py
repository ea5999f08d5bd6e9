"""The child process of the catalogue: imports plugins and writes down what they say about themselves.

python -m shiftproof.benchmark.registry.harvest FILE ROW...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from shiftproof.benchmark.config import describe, show_value
from shiftproof.benchmark.contracts import BackboneSpec, ExecutorSpec, MetricSpec, StrategySpec, StreamSpec, SuiteSpec
from shiftproof.benchmark.records import write_atomically
from shiftproof.benchmark.registry.discovery import Entry, installed_entries
from shiftproof.benchmark.registry.loading import PluginError, load_entry


def harvest(entry: Entry) -> dict[str, Any]:
    """A plugin's row: status, error, hooks and items as JSON values, without absolute paths."""
    try:
        loaded = load_entry(entry)
    except PluginError as error:
        return {"status": "broken", "error": error.reason, "hooks": [], "items": []}
    items = [
        {"kind": kind, "name": spec.name, "facts": _FACTS[kind](spec)} for kind, specs in loaded.specs.items() for spec in specs
    ]
    return {"status": "ok", "error": "", "hooks": list(loaded.hooks), "items": items}


def _strategy(spec: StrategySpec[Any]) -> dict[str, Any]:
    return {
        "summary": _summary(spec.build),
        "consumes": spec.consumes.__name__,
        "reference": spec.reference,
        "uses_group_labels": spec.uses_group_labels,
        "uses_bias_knowledge": spec.uses_bias_knowledge,
        "needs_data": spec.needs_data,
        "uses_target": spec.uses_target,
        "unavailable": spec.unavailable,
        "config": _config(spec.config),
        "presets": {name: _differences(spec.config(), preset) for name, preset in spec.presets.items()},
    }


def _stream(spec: StreamSpec[Any]) -> dict[str, Any]:
    return {
        "summary": spec.description,
        "tier": spec.tier,
        "reference": spec.reference,
        "licence": spec.licence,
        "files": list(spec.files),
        "config": _config(spec.config),
    }


def _suite(spec: SuiteSpec) -> dict[str, Any]:
    facts = asdict(spec)
    return {"summary": facts.pop("description"), **{key: value for key, value in facts.items() if key != "name"}}


def _metric(spec: MetricSpec) -> dict[str, Any]:
    return {
        "summary": spec.definition,
        "higher_is_better": spec.higher_is_better,
        "over_folds": spec.over_folds,
        "primary": spec.primary,
    }


def _backbone(spec: BackboneSpec) -> dict[str, Any]:
    return {"summary": spec.description, "reference": spec.reference}


def _executor(spec: ExecutorSpec) -> dict[str, Any]:
    return {"summary": spec.description, "unavailable": spec.unavailable}


_FACTS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "strategy": _strategy,
    "stream": _stream,
    "suite": _suite,
    "metric": _metric,
    "backbone": _backbone,
    "executor": _executor,
}


def _config(config_type: type[Any]) -> list[dict[str, str]]:
    return [asdict(knob) for knob in describe(config_type)]


def _differences(default: Any, preset: Any) -> dict[str, str]:
    """The knobs in which a preset differs from the defaults."""
    names = [knob.name for knob in fields(preset) if getattr(preset, knob.name) != getattr(default, knob.name)]
    return {name: show_value(getattr(preset, name)) for name in names}


def _summary(build: object) -> str:
    """The first line of its own docstring; a parent's would describe something else."""
    build = getattr(build, "func", build)  # of functools.partial
    text = getattr(build, "__dict__", {}).get("__doc__") if isinstance(build, type) else getattr(build, "__doc__", "")
    return (text or "").strip().split("\n")[0]


def main(file: str, names: list[str]) -> None:
    """Write the rows of the named plugins to a file."""
    rows = {str(entry): harvest(entry) for entry in installed_entries() if str(entry) in names}
    write_atomically(Path(file), json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
