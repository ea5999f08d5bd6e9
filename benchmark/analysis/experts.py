"""The experts of a stream, as a merge in the harness is given them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from shiftproof.benchmark import lifting
from shiftproof.benchmark.analysis.deltas import Deltas, Progress, silent
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import EvalSet, ExpertExperience
from shiftproof.benchmark.experts.making import (
    expert_of,
    folds_of,
    named_sources,
    namesakes,
    onlooker,
    onlooking,
)
from shiftproof.benchmark.merging.sources import InMemory
from shiftproof.benchmark.names import unknown
from shiftproof.benchmark.records import RunRequest
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.bases import check_base_file
from shiftproof.benchmark.running.cells import build_stream
from shiftproof.benchmark.streams import Fold, Stream

T = TypeVar("T")


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
    check_base_file(registry, stream)
    folds = folds_of(stream, request.fold)
    if reason := lifting.obstacle(onlooker(ExpertExperience), stream):
        raise InputError(f"expected a stream of data or of experts, got {stream.name}: {reason}")
    found, evals = named_sources(stream, request.fold), _evals(stream, folds)
    experts = {}
    with onlooking(registry, request, stream, device) as run:
        for name, source in found.items():
            experts[name] = expert_of(run, source)
            progress(name)
    return StreamExperts(stream, experts, evals)


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


def _evals(stream: Stream, folds: Sequence[Fold]) -> tuple[EvalSet, ...]:
    found: dict[str, EvalSet] = {}
    for fold in folds:
        for one in fold.evals:
            if found.setdefault(one.name, one) is not one:
                raise namesakes(stream, one.name)
    return tuple(found.values())
