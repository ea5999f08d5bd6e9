"""The experts of a stream, as a merge in the harness is given them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from shiftproof.benchmark import config, lifting
from shiftproof.benchmark.analysis.deltas import Deltas, Progress, silent
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import RunContext
from shiftproof.benchmark.contracts import StrategySpec
from shiftproof.benchmark.errors import InputError, NotFiniteError
from shiftproof.benchmark.experiences import DataExperience, EvalSet, Experience, ExpertExperience, GroupedExperience
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.names import unknown
from shiftproof.benchmark.recipes import BaseRecipe, Recipe
from shiftproof.benchmark.records import RunRequest
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.cells import build_stream, experts_of, identify
from shiftproof.benchmark.running.runner import CellRun
from shiftproof.benchmark.streams import Fold, Stream

T = TypeVar("T")


@dataclass(frozen=True)
class OnlookerConfig:
    """Nothing to choose."""


class Onlooker:
    """A strategy that takes experts in and merges nothing: what the harness makes the experts for."""

    def __init__(self, config: OnlookerConfig, context: RunContext) -> None:
        self.experts: list[ExpertExperience] = []

    def learn(self, experience: ExpertExperience) -> Mapping[str, float]:
        """Keep an expert."""
        self.experts.append(experience)
        return {}

    def model(self) -> Model:
        """The last expert."""
        return self.experts[-1].expert


ONLOOKER = StrategySpec("onlooker", Onlooker, OnlookerConfig, ExpertExperience, reference="none")


@dataclass(frozen=True, eq=False)
class StreamExperts:
    """Experts of a stream, and what they can be measured on.

    Attributes:
        experts: By name, in the order of the stream.
        evals: Of the folds that were asked for.
    """

    stream: Stream
    experts: Mapping[str, ExpertExperience]
    evals: tuple[EvalSet, ...]

    def deltas(self) -> Deltas:
        """What they changed in the tensors that all of them share."""
        shared = frozenset.intersection(*(one.shared for one in self.experts.values()))
        base = next(iter(self.experts.values())).base
        states = [InMemory(one.expert.state_dict(), name) for name, one in self.experts.items()]
        return Deltas(InMemory(base.state_dict(), "the base"), states, tuple(self.experts), shared.__contains__)


def request_for(registry: Registry, stream: str, seed: int, fold: str = "", overrides: Sequence[str] = ()) -> RunRequest:
    """What to build the stream with.

    Args:
        fold: "" = all folds.
        overrides: "stream.key=value", "recipe.key=value" and "base.key=value".

    Raises:
        InputError: If the stream, a scope, a knob or the seed is wrong.
    """
    if seed < 0:
        raise InputError(f"expected --seed of 0 or more, got {seed}")
    kinds = {"stream": registry.stream(stream).config, "recipe": Recipe, "base": BaseRecipe}
    scopes = config.split_overrides(overrides, {scope: [one.name for one in fields(kind)] for scope, kind in kinds.items()})
    knobs, recipe, base = (tuple(scopes[scope]) for scope in kinds)
    return RunRequest("", stream, seed, fold, knobs=knobs, recipe=recipe, base=base)


def experts_of_stream(
    registry: Registry, request: RunRequest, device: str = "cpu", data_root: str | None = None, progress: Progress = silent
) -> StreamExperts:
    """The experts that every merge of this stream, seed and recipe is given; trained now unless they are in the cache.

    Args:
        request: Of `request_for`.
        progress: Told the name of each expert that is there.

    Raises:
        InputError: If there is no such fold, or the stream's experiences cannot become experts.
    """
    stream = build_stream(registry, request, data_root)
    folds = _folds(stream, request.fold)
    if reason := lifting.obstacle(ONLOOKER, stream):
        raise InputError(f"expected a stream of data or of experts, got {stream.name}, which {reason}")
    experiences, evals = _experiences(stream, folds), _evals(stream, folds)
    experts = {}
    with tempfile.TemporaryDirectory() as folder:
        run = onlooking(registry, request, ONLOOKER, stream, device, Path(folder))
        for name, (one, fold) in experiences.items():
            experts[name] = _expert(one, fold, run)
            progress(name)
    return StreamExperts(stream, experts, evals)


def onlooking(
    registry: Registry, request: RunRequest, spec: StrategySpec[Any], stream: Stream, device: str, folder: Path
) -> CellRun:
    """A cell of a strategy that only looks on, for what the harness hands it; experts come out of the cache."""
    knobs = asdict(config.resolve(registry.stream(request.stream).config(), request.knobs, request.stream))
    cell = identify(request, spec, spec.config(), stream, knobs, device, experts_of(registry, spec, stream))
    return CellRun(cell, registry, folder, Cache(), device, math.inf)


def chosen(kind: str, known: Mapping[str, T], names: Sequence[str]) -> list[T]:
    """The values of these names.

    Raises:
        InputError: If a name is unknown or comes twice.
    """
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
        if names.count(name) > 1:
            raise InputError(f"expected every {kind} once, got {name!r} {names.count(name)} times")
    return [known[name] for name in names]


def _folds(stream: Stream, name: str) -> tuple[Fold, ...]:
    by_name = {fold.name: fold for fold in stream.folds}
    if name and name not in by_name:
        raise unknown(f"fold of {stream.name}", name, by_name)
    return (by_name[name],) if name else stream.folds


def _experiences(stream: Stream, folds: Sequence[Fold]) -> dict[str, tuple[Experience, Fold]]:
    """Every experience with a fold that has it; domains that are held out in turn come in the order of the folds."""
    found: dict[str, tuple[Experience, Fold]] = {}
    for fold in folds:
        for one in fold.train:
            known, _ = found.setdefault(one.name, (one, fold))
            if isinstance(one, DataExperience) and isinstance(known, DataExperience) and known.train is not one.train:
                raise _namesakes(stream, one.name)
    places = {fold.name: place for place, fold in enumerate(stream.folds)}
    return dict(sorted(found.items(), key=lambda item: places.get(item[0], 0)))


def _evals(stream: Stream, folds: Sequence[Fold]) -> tuple[EvalSet, ...]:
    found: dict[str, EvalSet] = {}
    for fold in folds:
        for one in fold.evals:
            if found.setdefault(one.name, one) is not one:
                raise _namesakes(stream, one.name)
    return tuple(found.values())


def _namesakes(stream: Stream, name: str) -> InputError:
    folds = ", ".join(fold.name for fold in stream.folds)
    return InputError(f"expected --fold, since {name!r} is not the same data in all folds of {stream.name}: {folds}")


def _expert(one: Experience, fold: Fold, run: CellRun) -> ExpertExperience:
    plain = one.without_groups() if isinstance(one, GroupedExperience) else one
    try:
        expert = run.consumed(plain, fold)
    except NotFiniteError as error:
        raise InputError(f"expected an expert on {one.name!r}, got: {error}; choose another --set recipe.lr") from error
    assert isinstance(expert, ExpertExperience)
    return expert
