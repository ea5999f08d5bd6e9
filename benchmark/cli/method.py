"""A strategy that a command applies to files, with its knobs as given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftproof.benchmark.cli.console import catalogue
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import problems_hint, unknown

if TYPE_CHECKING:
    from shiftproof.benchmark.contracts import StrategySpec
    from shiftproof.benchmark.registry.lookup import Registry


def strategy_named(label: str, overrides: Sequence[str], plugin: Sequence[Path]) -> tuple[StrategySpec[Any], str, Any]:
    """A strategy, its preset ("" = none) and its config after the overrides.

    Raises:
        InputError: If there is none of that name, it cannot run here, or a knob is wrong.
    """
    from dataclasses import fields

    from shiftproof.benchmark.config import resolve, split_overrides

    name = label.partition("@")[0]
    spec, preset, config = _registry(name, plugin).strategy(label)
    if spec.unavailable:
        raise InputError(f"expected a method that can run here, got {name!r}: {spec.unavailable}")
    pairs = split_overrides(overrides, {label: [field.name for field in fields(config)]})[label]
    return spec, preset, resolve(config, pairs, name)


def _registry(name: str, files: Sequence[Path]) -> Registry:
    """A registry with the plugin that provides a strategy, and no more: others take seconds to import."""
    from shiftproof.benchmark.registry.lookup import load_registry

    known = catalogue()
    registry = load_registry(known.providers({"strategy": [name]}), files)
    if name not in registry.strategies:
        problems = known.broken | {problem.name: problem.error for problem in registry.problems}
        raise unknown("strategy", name, {*registry.strategies, *known.items("strategy")}, problems_hint(problems))
    return registry
