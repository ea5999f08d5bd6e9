"""What is refused when a plugin registers a spec: facts that are missing or cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shiftproof.benchmark import contracts
from shiftproof.benchmark.config import check_type, check_values
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import NAME, SCOPES

Spec = (
    contracts.StrategySpec[Any]
    | contracts.StreamSpec[Any]
    | contracts.SuiteSpec
    | contracts.MetricSpec
    | contracts.BackboneSpec
    | contracts.ExecutorSpec
)


def check_spec(kind: str, spec: object) -> Spec:
    """The spec itself, if it is one of that kind and everything in it makes sense.

    Args:
        kind: "strategy", "stream", "suite", "metric", "backbone" or "executor".

    Raises:
        InputError: Saying which fact of which spec is wrong.
    """
    expected, check = _CHECKS[kind]
    if not isinstance(spec, expected):
        raise InputError(f"expected every {kind} as a {expected.__name__}, got {spec!r}")
    name = getattr(spec, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"expected the name of a {kind} in lower-case words joined by '-', got {name!r}")
    try:
        check(spec)
    except InputError as error:
        raise InputError(f"{kind} {name!r}: {error}") from error
    return spec  # type: ignore[return-value]  # isinstance above; mypy does not see it through the table


def _check_strategy(spec: contracts.StrategySpec[Any]) -> None:
    from shiftproof.benchmark.experiences import DataExperience, ExpertExperience  # needs torch

    if spec.name in SCOPES:
        raise InputError(f"expected a name that is no scope of overrides, got one of {', '.join(SCOPES)}; rename it")
    _check_callable("build", spec.build)
    _check_texts(reference=spec.reference)
    if not (isinstance(spec.consumes, type) and issubclass(spec.consumes, DataExperience | ExpertExperience)):
        raise InputError(f"expected `consumes` to be an experience type such as DataExperience, got {spec.consumes!r}")
    check_type(spec.config)
    for preset, config in spec.presets.items():
        if not NAME.fullmatch(preset):
            raise InputError(f"expected the name of a preset in lower-case words joined by '-', got {preset!r}")
        if type(config) is not spec.config:
            raise InputError(f"preset {preset!r}: expected a {spec.config.__name__}, got {type(config).__name__}")
        check_values(config)


def _check_stream(spec: contracts.StreamSpec[Any]) -> None:
    _check_callable("build", spec.build)
    _check_texts(description=spec.description, licence=spec.licence)
    if spec.tier not in ("digits", "full"):
        raise InputError(f"expected tier 'digits' or 'full', got {spec.tier!r}")
    check_type(spec.config)


def _check_suite(spec: contracts.SuiteSpec) -> None:
    for what in ("streams", "strategies", "seeds"):
        if not getattr(spec, what):
            raise InputError(f"expected at least one of {what}, got none")
    for seed in spec.seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"expected seeds to be integers of 0 or more, got {seed!r}")
    if len(set(spec.seeds)) != len(spec.seeds):
        raise InputError(f"expected every seed once, got {', '.join(map(str, spec.seeds))}")


def _check_metric(spec: contracts.MetricSpec) -> None:
    _check_callable("compute", spec.compute)
    _check_texts(definition=spec.definition)
    if spec.over_folds not in ("mean", "worst"):
        raise InputError(f"expected over_folds 'mean' or 'worst', got {spec.over_folds!r}")


def _check_backbone(spec: contracts.BackboneSpec) -> None:
    _check_callable("build", spec.build)
    _check_texts(description=spec.description)


def _check_executor(spec: contracts.ExecutorSpec) -> None:
    _check_callable("build", spec.build)
    _check_texts(description=spec.description)


def _check_callable(what: str, value: object) -> None:
    if not callable(value):
        raise InputError(f"expected `{what}` to be callable, got {value!r}")


def _check_texts(**texts: object) -> None:
    for what, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"expected a {what} in words, got {text!r}")


_CHECKS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "strategy": (contracts.StrategySpec, _check_strategy),
    "stream": (contracts.StreamSpec, _check_stream),
    "suite": (contracts.SuiteSpec, _check_suite),
    "metric": (contracts.MetricSpec, _check_metric),
    "backbone": (contracts.BackboneSpec, _check_backbone),
    "executor": (contracts.ExecutorSpec, _check_executor),
}
