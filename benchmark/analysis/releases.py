"""Loss on the way from an aligned old release to the new one, and accuracy over the scale of a task vector.

Thesis section 8.3.2 with Fig. 8.4, and Fig. 8.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

from shiftproof.benchmark import lifting
from shiftproof.benchmark.analysis.barrier import barrier_height, check_points
from shiftproof.benchmark.analysis.deltas import Progress, silent
from shiftproof.benchmark.analysis.measuring import Measured, measure
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.evaluation import evaluate
from shiftproof.benchmark.experiences import EvalSet, StateDict, TransportExperience
from shiftproof.benchmark.experts.making import Source, expert_of, onlooker, onlooking
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.records import RunRequest
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.bases import check_base_file
from shiftproof.benchmark.running.cells import build_stream
from shiftproof.benchmark.streams import Stream
from shiftproof.benchmark.transporting.alignment import Alignment, added, task_vector
from shiftproof.benchmark.transporting.architectures import derive_model
from shiftproof.benchmark.transporting.method import RebasinMethod
from shiftproof.benchmark.transporting.residuals import interpolated, residual_maps

WITHOUT_MAPS = ", no residual maps"


@dataclass(frozen=True, eq=False)
class Transports:
    """Fine-tunings of a stream's base and the release that they should go to.

    Attributes:
        experiences: By the name of their fold, with the eval sets of that fold.
    """

    stream: Stream
    experiences: Mapping[str, tuple[TransportExperience, tuple[EvalSet, ...]]]


@dataclass(frozen=True)
class Line:
    """Measured on the way from the aligned source to the target.

    Attributes:
        label: The method, and whether its residual maps were left out.
        losses: Cross-entropy, mean over eval sets, at each point.
    """

    label: str
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def height(self) -> float:
        """The loss barrier."""
        return barrier_height(self.losses)


@dataclass(frozen=True)
class Curve:
    """A method's accuracies over the scale of the task vector.

    Attributes:
        accuracies: `accuracies[a][f][g]` at scale a on fold f in group g.
    """

    label: str
    accuracies: tuple[tuple[tuple[float, ...], ...], ...]


def transports_of_stream(
    registry: Registry, request: RunRequest, device: str = "cpu", data_root: str | None = None, progress: Progress = silent
) -> Transports:
    """The fine-tunings that every transport of this stream, seed and recipe is given; made now unless they are in the cache.

    Raises:
        InputError: If the stream has no new release, or there is no such fold.
    """
    stream = build_stream(registry, request, data_root)
    check_base_file(registry, stream)
    if lifting.obstacle(onlooker(TransportExperience), stream):
        raise InputError(
            f"expected a stream that goes to a new release of its base, got {stream.name}, which does not; choose another"
        )
    found = {}
    with onlooking(registry, request, stream, device) as run:
        for fold in stream.folds:
            (one,) = fold.train
            experience = expert_of(run, Source(fold.name, one, fold))
            assert isinstance(experience, TransportExperience)
            found[fold.name] = (experience, fold.evals)
            progress(fold.name)
    return Transports(stream, found)


def method_named(registry: Registry, label: str) -> RebasinMethod:
    """A strategy that aligns two releases.

    Raises:
        InputError: If there is none of that name, or it does not align.
    """
    spec, _, preset = registry.strategy(label)
    if spec.consumes is not TransportExperience or not hasattr(spec.build, "align") or spec.needs_data:
        raise InputError(
            f"expected methods that align two releases without data, got {label!r}; `shiftproof list strategies` tells"
        )
    built: RebasinMethod = spec.build(preset, None)  # type: ignore[arg-type, assignment]  # there is no run to have a context
    return built


def alignment_of(method: RebasinMethod, experience: TransportExperience) -> Alignment:
    """The alignment of the experience's two releases."""
    assert experience.target_base is not None
    source, target = (_shared(model, experience) for model in (experience.base, experience.target_base))
    return method.align(source, target, derive_model(experience.base).restricted(experience.shared))


def barriers(
    found: Transports, methods: Mapping[str, RebasinMethod], points: int, progress: Progress = silent
) -> tuple[tuple[float, ...], list[Line]]:
    """Loss on the way from pi(theta_A) to theta_B, with the residual maps interpolated and rounded, and without them.

    Only what the releases' own head answers is measured.

    Args:
        points: Ends included.

    Raises:
        InputError: As `barrier.check_points`, or if no eval set is answered by that head.
    """
    check_points(points)
    shares = tuple(place / (points - 1) for place in range(points))
    experience, _ = next(iter(found.experiences.values()))
    assert experience.target_base is not None
    evals = _own_evals(found)
    source, target = (_shared(model, experience) for model in (experience.base, experience.target_base))
    lines = []
    for label, method in methods.items():
        alignment = alignment_of(method, experience)
        specification, moved = alignment.specification, alignment.apply(source)
        maps = residual_maps(specification, alignment.permutations)
        is_bent = any(not units.equal(units.sort().values) for units in maps.values())
        for name, kept in ((label, maps), *([(label + WITHOUT_MAPS, {})] if is_bent else [])):
            states = (interpolated(specification, moved, target, kept, share) for share in shares)
            measured = [_measured(experience.target_base, state, evals) for state in states]
            lines.append(Line(name, tuple(one.loss for one in measured), tuple(one.accuracy for one in measured)))
            progress(name)
    return shares, lines


def scales(
    found: Transports, methods: Mapping[str, RebasinMethod], alphas: Sequence[float], progress: Progress = silent
) -> list[Curve]:
    """Accuracy in every group of every fold over the scale of the task vector; at 0 it is the new release's own."""
    curves = []
    first, _ = next(iter(found.experiences.values()))
    for label, method in methods.items():
        alignment = alignment_of(method, first)  # one for all fine-tunings
        rows: list[list[tuple[float, ...]]] = [[] for _ in alphas]
        for experience, evals in found.experiences.values():
            for row, accuracies in zip(rows, _over(alphas, alignment, experience, evals), strict=True):
                row.append(accuracies)
        curves.append(Curve(label, tuple(map(tuple, rows))))
        progress(label)
    return curves


def _over(
    alphas: Sequence[float], alignment: Alignment, experience: TransportExperience, evals: Sequence[EvalSet]
) -> list[tuple[float, ...]]:
    assert experience.target_base is not None
    target = _shared(experience.target_base, experience)
    tuned = {name: tensor.detach().cpu() for name, tensor in experience.expert.state_dict().items()}
    vector = alignment.apply(task_vector(_shared(experience.base, experience), {name: tuned[name] for name in target}))
    whole = derive_model(experience.base)
    heads = {name: whole.apply_to(name, tuned[name], alignment.permutations) for name in experience.private}
    model, device = deepcopy(experience.target_base), next(experience.target_base.parameters()).device
    rows = []
    for alpha in alphas:
        model.load_state_dict({**added(target, vector, alpha), **heads}, strict=False)
        (counts,) = evaluate(model, evals, device)
        rows.append(tuple(correct / total for correct, total in counts.groups))
    return rows


def _measured(like: Model, state: StateDict, evals: Sequence[EvalSet]) -> Measured:
    model = deepcopy(like)
    model.load_state_dict(state, strict=False)
    return measure(model, evals, next(model.parameters()).device)


def _own_evals(found: Transports) -> tuple[EvalSet, ...]:
    """What the head that both releases bring can answer, each data set once."""
    sets = {}
    for _, evals in found.experiences.values():
        for one in evals:
            if all(task == 0 for task, _ in one.parts):
                sets[one.name] = one
    if not sets:
        raise InputError(f"expected a stream whose releases answer an eval set by themselves, got {found.stream.name}")
    return tuple(sets.values())


def _shared(model: Model, experience: TransportExperience) -> StateDict:
    state = model.state_dict()
    return {name: state[name].detach().cpu() for name in sorted(experience.shared)}
