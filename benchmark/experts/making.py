"""A stream's experts without a strategy that uses them: the very ones, out of the same cache, that a run is given."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from shiftproof.benchmark import config, lifting
from shiftproof.benchmark.cache import Cache, NotCachedError
from shiftproof.benchmark.context import RunContext
from shiftproof.benchmark.contracts import StrategySpec
from shiftproof.benchmark.errors import InputError, NotFiniteError
from shiftproof.benchmark.experiences import (
    DataExperience,
    Experience,
    ExpertExperience,
    GroupedExperience,
    TransportExperience,
)
from shiftproof.benchmark.inventory import EXPERT
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.names import unknown
from shiftproof.benchmark.pretraining import BASE
from shiftproof.benchmark.recipes import BaseRecipe, Recipe
from shiftproof.benchmark.records import RunRequest
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.cells import experts_of, identify
from shiftproof.benchmark.running.runner import CellRun
from shiftproof.benchmark.streams import Fold, Stream

State = Literal["trained", "found", "missing"]


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


@dataclass(frozen=True, eq=False)
class Source:
    """What an expert is fine-tuned on, and a fold that has it.

    Attributes:
        label: The experience's name, with the fold's before it where folds have other data under one name.
    """

    label: str
    experience: Experience
    fold: Fold


@dataclass(frozen=True)
class Row:
    """What became of a base (`seed` None: all seeds share it) or of an expert."""

    seed: int | None
    name: str
    state: State


def onlooker(consumes: type[ExpertExperience]) -> StrategySpec[Any]:
    """The strategy for experts of that type."""
    return StrategySpec("onlooker", Onlooker, OnlookerConfig, consumes, reference="none")


def onlooker_of(stream: Stream) -> StrategySpec[Any]:
    """The strategy for the stream's kind of experts."""
    return onlooker(ExpertExperience if stream.release is None else TransportExperience)


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


@contextmanager
def onlooking(
    registry: Registry, request: RunRequest, stream: Stream, device: str, cache: Cache | None = None
) -> Iterator[CellRun]:
    """A cell of a strategy that only looks on, for what the harness hands it; experts come out of the cache."""
    spec = onlooker_of(stream)
    knobs = asdict(config.resolve(registry.stream(request.stream).config(), request.knobs, request.stream))
    cell = identify(request, spec, spec.config(), stream, knobs, device, experts_of(registry, spec, stream))
    with tempfile.TemporaryDirectory() as folder:
        yield CellRun(cell, registry, Path(folder), cache or Cache(), device, math.inf)


def check_fine_tuned(stream: Stream) -> None:
    """Raises InputError unless the stream's experts are fine-tuned by the harness, on each experience alone."""
    if not lifting.is_lifted(onlooker_of(stream), stream):
        kinds = sorted({type(one).__name__ for fold in stream.folds for one in fold.train})
        raise InputError(
            f"expected a stream with data of each task or domain to fine-tune experts on, got {stream.name}, "
            f"which yields {', '.join(kinds)}; choose another stream"
        )


def sources(stream: Stream, fold: str = "") -> list[Source]:
    """What the stream has an expert for; domains that are held out in turn come once, in the order of the folds.

    Args:
        fold: "" = all folds.

    Raises:
        InputError: If there is no such fold.
    """
    found: dict[str, list[Source]] = {}
    for one in folds_of(stream, fold):
        for experience in one.train:
            known = found.setdefault(experience.name, [])
            if not any(_same(experience, other.experience) for other in known):
                known.append(Source(experience.name, experience, one))
    places = {one.name: place for place, one in enumerate(stream.folds)}
    ordered = sorted(found.items(), key=lambda item: places.get(item[0], 0))
    return [
        source if len(known) == 1 else replace(source, label=f"{source.fold.name}/{name}")
        for name, known in ordered
        for source in known
    ]


def named_sources(stream: Stream, fold: str = "") -> dict[str, Source]:
    """The same by name.

    Raises:
        InputError: If folds have other data under one name.
    """
    found = sources(stream, fold)
    for source in found:
        if source.label != source.experience.name:
            raise namesakes(stream, source.experience.name)
    return {source.label: source for source in found}


def namesakes(stream: Stream, name: str) -> InputError:
    """What to raise where folds have other data under one name."""
    folds = ", ".join(fold.name for fold in stream.folds)
    return InputError(f"expected --fold, since {name!r} is not the same data in all folds of {stream.name}: {folds}")


def folds_of(stream: Stream, name: str) -> tuple[Fold, ...]:
    """The fold of that name, all for "". Raises InputError if there is none."""
    by_name = {fold.name: fold for fold in stream.folds}
    if name and name not in by_name:
        raise unknown(f"fold of {stream.name}", name, by_name)
    return (by_name[name],) if name else stream.folds


def expert_of(run: CellRun, source: Source) -> ExpertExperience:
    """The expert, as a strategy of the harness is given it.

    Raises:
        InputError: If fine-tuning diverges.
        NotCachedError: If the run's cache makes nothing, and it is not there.
    """
    one = source.experience
    plain = one.without_groups() if isinstance(one, GroupedExperience) else one
    try:
        expert = run.consumed(plain, source.fold)
    except NotFiniteError as error:
        raise InputError(f"expected an expert on {one.name!r}, got: {error}; choose another --set recipe.lr") from error
    assert isinstance(expert, ExpertExperience)
    return expert


def train(
    registry: Registry,
    request: RunRequest,
    stream: Stream,
    seeds: Sequence[int],
    device: str,
    cache: Cache,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Row]:
    """Make the base and every expert that the cache does not hold yet; a cache that makes nothing tells what is missing.

    Args:
        request: Of `request_for`; its seed is passed over.
        progress: Told the name of each expert that is there.

    Raises:
        InputError: If the stream's experts are not fine-tuned here, or fine-tuning diverges.
    """
    check_fine_tuned(stream)
    rows: list[Row] = []
    for seed in seeds:
        with onlooking(registry, replace(request, seed=seed), stream, device, cache) as run:
            if not rows:
                rows += _bases(run, cache)
            for source in sources(stream):
                state = _state(cache, EXPERT, lambda source=source, run=run: expert_of(run, source))  # type: ignore[misc]
                rows.append(Row(seed, source.label, state))
                progress(source.label)
    return rows


def _bases(run: CellRun, cache: Cache) -> list[Row]:
    """Base and release, where they are learned and kept."""
    stream = run.cell.stream
    rows = [Row(None, "base", _state(cache, BASE, run.bases.base_weights))] if stream.base.is_learned else []
    if stream.release is not None and stream.release.is_learned:
        rows.append(Row(None, "release", _state(cache, BASE, run.bases.release_weights)))
    return rows


def _state(cache: Cache, kind: str, make: Callable[[], Any]) -> State:
    made = cache.made[kind]
    try:
        make()
    except NotCachedError:
        return "missing"
    return "trained" if cache.made[kind] > made else "found"


def _same(one: Experience, other: Experience) -> bool:
    return not (isinstance(one, DataExperience) and isinstance(other, DataExperience)) or one.train is other.train


def key_of(run: CellRun, source: Source) -> dict[str, Any]:
    """What determines the expert: its key in the cache."""
    assert isinstance(source.experience, DataExperience)
    code_sha256 = run.cell.identity["experts"]["code_sha256"]
    return lifting.expert_key(run.context.new_model(), source.experience, run.cell.stream, code_sha256, run.context)
