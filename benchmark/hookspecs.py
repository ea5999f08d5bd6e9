"""Every extension point. Contributors return specs without side effects; observers are read-only and come after the fact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from shiftproof.benchmark.contracts import BackboneSpec, ExecutorSpec, MetricSpec, StrategySpec, StreamSpec, SuiteSpec
    from shiftproof.benchmark.records import RunRecord, RunRequest

hookspec = pluggy.HookspecMarker("shiftproof")
hookimpl = pluggy.HookimplMarker("shiftproof")


@hookspec
def shiftproof_strategies() -> Iterable[StrategySpec[Any]]:  # type: ignore[empty-body]
    """Strategies: methods that learn from experiences."""


@hookspec
def shiftproof_streams() -> Iterable[StreamSpec[Any]]:  # type: ignore[empty-body]
    """Streams: sequences of experiences with held-out sets."""


@hookspec
def shiftproof_suites() -> Iterable[SuiteSpec]:  # type: ignore[empty-body]
    """Suites: matrices of streams, strategies and seeds."""


@hookspec
def shiftproof_metrics() -> Iterable[MetricSpec]:  # type: ignore[empty-body]
    """Metrics: pure functions of a cell's scores."""


@hookspec
def shiftproof_backbones() -> Iterable[BackboneSpec]:  # type: ignore[empty-body]
    """Backbones: networks from inputs to features."""


@hookspec
def shiftproof_executors() -> Iterable[ExecutorSpec]:  # type: ignore[empty-body]
    """Executors: ways to run the cells of a matrix."""


@hookspec
def shiftproof_run_started(request: RunRequest) -> None:
    """A cell starts."""


@hookspec
def shiftproof_experience_learned(
    request: RunRequest, experience: str, logs: Mapping[str, float], row: Sequence[Sequence[tuple[int, int]]]
) -> None:
    """An experience was learned; `row` holds (correct, total) per eval set and group."""


@hookspec
def shiftproof_run_finished(record: RunRecord) -> None:
    """A record is on disk, finished or failed."""
