"""Two releases on the digits: who sees what, what is measured, and cells of two toy transports from end to end.

The file is a plugin, too: it registers the toys and streams that are pre-trained for a moment only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shiftproof.benchmark import (
    ArrayData,
    DataExperience,
    InputError,
    Model,
    RunContext,
    Scenario,
    StrategySpec,
    Stream,
    StreamSpec,
    SuiteSpec,
    TransportExperience,
    hookimpl,
)
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import Strategy
from shiftproof.benchmark.evaluation import evaluate
from shiftproof.benchmark.pretraining import class_embeddings
from shiftproof.benchmark.records import RunRecord
from shiftproof.benchmark.registry.lookup import Registry, load_registry
from shiftproof.benchmark.running.matrix import Plan, plan
from shiftproof.benchmark.running.runner import Cell, CellRun, run_cell
from shiftproof.datasets.digits import NAMES, TASKS
from shiftproof.datasets.digits_releases import (
    CLOSED,
    OPEN,
    ReleasesConfig,
    digits_releases,
    digits_releases_open,
    digits_vit_barrier,
    parts,
)
from shiftproof.datasets.splits import digits, split

# Any change of the pictures or of their order shows here; boards made before are then void.
DATA_SHA256 = {
    "digits-releases": "a8edfbd8f38fbbb118310d4617cfd16527bda3437329c0042d77be85760b028d",
    "digits-releases-open": "b96a0caf0c77ffc3dd73bb60d66e4fe5ee2cd4165f39415bd69784ac3898a6c5",
    "digits-vit-barrier": "b15425e25eb329b6591d130c817c2df16cbafe1c4192223d2bb82dcc67ba5cf5",
}
BUILDS: dict[str, Callable[[ReleasesConfig], Stream]] = {
    "digits-releases": digits_releases,
    "digits-releases-open": digits_releases_open,
    "digits-vit-barrier": digits_vit_barrier,
}
ALL = pytest.mark.parametrize("name", BUILDS)
WITH_SUPPORT = pytest.mark.parametrize("name", ["digits-releases", "digits-releases-open"])


@dataclass(frozen=True)
class ToyConfig:
    """Knobs of the toys."""

    scale: float = 1.0  # of the task vector


class Carrier:
    """Adds the task vector to the new release as it is, and takes the private head over."""

    def __init__(self, config: ToyConfig, context: RunContext) -> None:
        self.config = config
        self.net = context.new_model()
        self.seen: TransportExperience | None = None

    def learn(self, experience: TransportExperience) -> Mapping[str, float]:
        """Carry the fine-tuning over."""
        assert experience.target_base is not None
        self.seen = experience
        self.net = deepcopy(experience.target_base)
        base, tuned, target = (m.state_dict() for m in (experience.base, experience.expert, self.net))
        moved = {name: target[name] + self.config.scale * (tuned[name] - base[name]) for name in experience.shared}
        self.net.load_state_dict({**target, **moved, **{name: tuned[name] for name in experience.private}})
        return {"data": float(experience.data is not None)}

    def model(self) -> nn.Module:
        """The new release with what it was given."""
        return self.net


class Other(Carrier):
    """The same under another name."""


def shortened(build: Callable[[ReleasesConfig], Stream], config: ReleasesConfig, root: str | None = None) -> Stream:
    """A stream whose releases and experts learn for one epoch."""
    stream = build(config)
    assert stream.release is not None
    base, release = (replace(one, epochs=1) for one in (stream.base, stream.release))
    return replace(stream, name=f"short-{stream.name}", base=base, release=release, recipe=replace(stream.recipe, epochs=1))


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """The toys."""
    reference = "Toy et al., Journal of Toys, 2024"
    return [
        StrategySpec("carrier", Carrier, ToyConfig, TransportExperience, reference, presets={"still": ToyConfig(scale=0.0)}),
        StrategySpec("other-carrier", Other, ToyConfig, TransportExperience, reference, needs_data=True),
    ]


@hookimpl
def shiftproof_streams() -> list[StreamSpec[Any]]:
    """The short streams."""
    return [
        StreamSpec(f"short-{name}", partial(shortened, build), ReleasesConfig, "digits", "short", "digits", "CC BY 4.0")
        for name, build in BUILDS.items()
    ]


@pytest.fixture(scope="module")
def streams() -> dict[str, Stream]:
    return {name: build(ReleasesConfig()) for name, build in BUILDS.items()}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry(("fine-tuning", "references", "digits-releases"), [Path(__file__)])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("releases"))


def planned(registry: Registry, strategies: str, stream: str, *overrides: str, seeds: tuple[int, ...] = (0,)) -> Plan:
    return plan(registry, SuiteSpec("test", "a test", (stream,), tuple(strategies.split(",")), seeds), overrides)


def experience_of(stream: Stream, fold: int = 0) -> DataExperience:
    (experience,) = stream.folds[fold].train
    assert isinstance(experience, DataExperience)
    return experience


def pictures(data: ArrayData) -> set[bytes]:
    return {x.numpy().tobytes() for x in data.x}


def test_a_b_tasks_and_held_out_share_no_digit() -> None:
    every = parts(ReleasesConfig())
    assert all(not set(one.tolist()) & set(other.tolist()) for one, other in combinations(every, 2))
    assert [len(one) for one in every[:3]] == [180, 600, 470]
    assert set(every.held_out.tolist()) == set(np.flatnonzero(split(0).held_out).tolist())


@WITH_SUPPORT
def test_b_never_sees_what_a_sees_and_no_task_or_support_is_seen_by_either(name: str, streams: dict[str, Stream]) -> None:
    stream, every = streams[name], parts(ReleasesConfig())
    labels = torch.tensor(digits()[1])
    assert stream.base_data is not None
    assert stream.release_data is not None
    assert torch.equal(stream.base_data.y, labels[every.base])
    assert torch.equal(stream.release_data.y, labels[every.release])
    assert not pictures(stream.base_data) & pictures(stream.release_data)
    for fold in stream.folds:
        (experience,) = fold.train
        assert isinstance(experience, DataExperience)
        for held in (experience.train, *(data for _, data in fold.evals[0].parts)):
            assert not pictures(held) & (pictures(stream.base_data) | pictures(stream.release_data))


@WITH_SUPPORT
def test_the_support_is_the_same_for_every_task_and_never_tuned_on(name: str, streams: dict[str, Stream]) -> None:
    stream = streams[name]
    held_out = parts(ReleasesConfig()).held_out
    supports = [fold.evals[0].parts[1] for fold in stream.folds]
    assert {task for task, _ in supports} == {0}
    assert len({data.sha256() for _, data in supports}) == 1
    assert torch.equal(supports[0][1].y, torch.tensor(digits()[1][held_out]))
    assert not any(pictures(supports[0][1]) & pictures(experience_of(stream, fold).train) for fold in range(4))


@WITH_SUPPORT
def test_a_fold_a_task_measured_on_itself_and_on_the_support(name: str, streams: dict[str, Stream]) -> None:
    stream = streams[name]
    assert (stream.scenario, stream.evaluate) == (Scenario.TRANSPORT, "last")
    assert [fold.name for fold in stream.folds] == list(CLOSED if name == "digits-releases" else OPEN)
    for fold in stream.folds:
        (evaluation,) = fold.evals
        (task, data), (_, support) = evaluation.parts
        assert task == experience_of(stream, stream.folds.index(fold)).task
        assert evaluation.group_names == ("task", "support")
        assert evaluation.groups.tolist() == [0] * len(data) + [1] * len(support)


def test_closed_tasks_ask_a_balanced_question_of_digits_that_are_theirs(streams: dict[str, Stream]) -> None:
    stream, (_, labels) = streams["digits-releases"], digits()
    assert stream.heads == {0: 10, 1: 2, 2: 2, 3: 2, 4: 2}
    assert not stream.frozen_heads
    for number, fold in enumerate(stream.folds):
        experience, (task, test) = experience_of(stream, number), fold.evals[0].parts[0]
        assert experience.task == task == number + 1
        assert {NAMES[number]} == {fold.name, experience.name}
        for data, index in ((experience.train, parts(ReleasesConfig()).tasks), (test, parts(ReleasesConfig()).held_out)):
            yes = np.isin(labels[index], TASKS[fold.name]).sum()
            assert data.y.bincount().tolist() == [min(yes, len(index) - yes)] * 2


def test_open_tasks_are_ten_classes_under_class_embeddings_that_both_releases_share(streams: dict[str, Stream]) -> None:
    stream = streams["digits-releases-open"]
    assert stream.release is not None
    assert (stream.heads, stream.frozen_heads) == ({0: 10}, True)
    assert stream.base.kind == stream.release.kind == "class-embeddings"
    _, labels = digits()
    for number in range(len(OPEN)):
        assert torch.equal(experience_of(stream, number).train.y, torch.tensor(labels[parts(ReleasesConfig()).tasks]))
    assert len({experience_of(stream, number).train.sha256() for number in range(4)}) == 4


def test_the_barriers_ends_learn_from_the_same_digits_and_differ_in_their_seed(streams: dict[str, Stream]) -> None:
    stream, every = streams["digits-vit-barrier"], parts(ReleasesConfig())
    assert stream.base_data is not None
    assert stream.release_data is not None
    assert stream.release is not None
    assert stream.base_data.sha256() == stream.release_data.sha256()
    assert len(stream.base_data) == len(every.base) + len(every.release)
    assert replace(stream.base, seed=stream.release.seed) == stream.release != stream.base
    (fold,) = stream.folds
    assert (fold.evals[0].group_names, experience_of(stream).task, len(experience_of(stream).train)) == (
        ("digits",),
        0,
        len(every.tasks),
    )
    seen = pictures(stream.base_data)
    assert not seen & (pictures(fold.evals[0].parts[0][1]) | pictures(experience_of(stream).train))


@ALL
def test_the_pixels_are_the_same_on_every_machine(name: str, streams: dict[str, Stream]) -> None:
    assert streams[name].data_sha256 == DATA_SHA256[name]


@pytest.mark.parametrize(
    "knobs", [{"split_seed": 3}, {"base_samples": 100}, {"release_samples": 400}, {"task_samples": 300}, {"noise": 20}]
)
@ALL
def test_who_is_where_is_in_the_split_hash_and_every_knob_in_some_hash(
    name: str, streams: dict[str, Stream], knobs: dict[str, int]
) -> None:
    was, now = streams[name], BUILDS[name](replace(ReleasesConfig(), **knobs))
    hashes = [(s.data_sha256, s.base_sha256, s.release_sha256) for s in (was, now)]
    assert hashes[0] != hashes[1]
    assert (was.split_sha256 == now.split_sha256) == ("noise" in knobs)


def test_more_samples_than_there_are_digits_is_one_line() -> None:
    with pytest.raises(InputError, match="expected base_samples, release_samples and task_samples") as caught:
        digits_releases(ReleasesConfig(base_samples=900))
    assert "\n" not in str(caught.value)


def test_the_three_streams_are_installed(registry: Registry) -> None:
    assert set(BUILDS) <= registry.streams.keys()


# --- cells ---


def finished(cell: Cell, registry: Registry, out: Path, cache: Cache) -> RunRecord:
    record = run_cell(cell, registry, out, cache)
    assert record.status == "finished", record.error
    return record


def test_the_experts_of_a_stream_are_made_once_whatever_the_number_of_transports(registry: Registry, tmp_path: Path) -> None:
    made = planned(registry, "carrier,carrier@still,other-carrier", "short-digits-releases").cells
    assert len(made) == 3 * len(CLOSED)
    cells = [cell for cell in made if cell.request.fold in CLOSED[:2]]
    own = Cache(tmp_path / "cache")
    records = [finished(cell, registry, tmp_path / "out", own) for cell in cells]
    assert own.made == {"base": 2, "expert": 2}
    assert sum(record.cost["experts_trained"] for record in records) == 2
    assert sum(record.cost["experts_reused"] for record in records) == 4
    by_label = {(r.label, r.identity["fold"]): r.results for r in records}
    for fold in CLOSED[:2]:
        assert by_label["carrier", fold] == by_label["other-carrier", fold] != by_label["carrier@still", fold]
    assert {r.label: r.logs[0]["data"] for r in records} == {"carrier": 0, "carrier@still": 0, "other-carrier": 1}


@ALL
def test_identity_and_protocol_name_the_release_as_they_name_the_base(
    name: str, registry: Registry, tmp_path: Path, cache: Cache
) -> None:
    cell = planned(registry, "carrier", f"short-{name}").cells[0]
    record, stream = finished(cell, registry, tmp_path, cache), cell.stream
    assert stream.release is not None
    assert record.identity["release"].keys() == record.identity["base"].keys()
    assert record.identity["release"]["seed"] == stream.release.seed != stream.base.seed
    assert record.identity["release"]["sha256"] == record.protocol["release_sha256"] == stream.release_sha256
    assert record.protocol["release_sha256"] != record.protocol["base_sha256"] == stream.base_sha256
    assert len(record.protocol["release_weights_sha256"]) == 64
    assert record.protocol["release_weights_sha256"] != record.protocol["base_weights_sha256"]
    assert record.identity["experts"]["strategy"] == "sgd"
    assert [entry["groups"] for entry in record.results["eval_sets"]] == [list(stream.folds[0].evals[0].group_names)]  # type: ignore[index]


def test_another_release_is_another_run(registry: Registry) -> None:
    cell = planned(registry, "carrier", "short-digits-releases").cells[0]
    again = planned(registry, "carrier", "short-digits-releases").cells[0]
    deeper = planned(registry, "carrier", "short-digits-releases", "release_samples=400").cells[0]
    assert cell.run_id == again.run_id != deeper.run_id
    other = planned(registry, "carrier", "short-digits-releases", "base.backbone=digits-resnet").cells[0]
    assert other.stream.release is not None
    assert other.stream.release.backbone == "digits-resnet"  # a release has the base's architecture
    assert other.request.custom


def test_pixels_do_not_depend_on_the_seed_of_the_run(registry: Registry) -> None:
    first, second = (planned(registry, "carrier", "short-digits-releases", seeds=(seed,)).cells[0] for seed in (0, 5))
    assert first.identity["data_sha256"] == second.identity["data_sha256"]
    assert first.identity["release"] == second.identity["release"]
    assert first.run_id != second.run_id


@ALL
def test_only_transport_meets_a_stream_with_a_release(name: str, registry: Registry) -> None:
    made = planned(registry, "carrier,sgd,joint,zero-shot,experts", name)
    assert {cell.spec.name for cell in made.cells} == {"carrier"}
    assert [skip.reason for skip in made.skipped] == ["the stream carries a fine-tuning to a new release"] * 4


class Seen:
    """What a strategy was given in a cell, and the cell's own run."""

    def __init__(self, registry: Registry, stream: str, cache: Cache, out: Path) -> None:
        self.cell = planned(registry, "carrier", stream).cells[0]
        self.run = CellRun(self.cell, registry, out, cache, "cpu", 30.0)
        strategy: Strategy[Any] = self.cell.spec.build(self.cell.config, self.run.context)
        self.run.cell = replace(self.cell, spec=replace(self.cell.spec, build=lambda *_: strategy))
        self.results = self.run.results()
        seen = getattr(strategy, "seen")  # noqa: B009
        assert isinstance(seen, TransportExperience)
        assert seen.target_base is not None
        self.experience, self.target = seen, seen.target_base


@pytest.fixture(scope="module")
def closed(registry: Registry, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(registry, "short-digits-releases", cache, tmp_path_factory.mktemp("closed"))


@pytest.fixture(scope="module")
def opened(registry: Registry, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(registry, "short-digits-releases-open", cache, tmp_path_factory.mktemp("open"))


def heads_of(model: Model, task: int) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name in model.head_keys(task)}


def test_a_closed_task_shares_backbone_and_head_0_and_keeps_its_own_head(closed: Seen) -> None:
    experience = closed.experience
    assert (experience.name, experience.task, experience.has_zero_shot_head) == ("even", 1, True)
    assert experience.private == {"heads.1.weight", "heads.1.bias"}
    backbone = {name for name in experience.base.state_dict() if name.startswith("backbone.")}
    assert experience.shared == backbone | {"heads.0.weight", "heads.0.bias"}
    # Fine-tuning trains the backbone and the task's own head.
    base, tuned = experience.base.state_dict(), experience.expert.state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == backbone | experience.private


def test_the_target_is_b_with_b_s_own_head_and_fresh_heads_like_a_s(closed: Seen) -> None:
    base, target = closed.experience.base.state_dict(), closed.target.state_dict()
    again = closed.run.release().state_dict()
    assert all(torch.equal(target[name], again[name]) for name in target)
    assert not torch.equal(target["heads.0.weight"], base["heads.0.weight"])
    assert not torch.equal(target["backbone.pos_embed"], base["backbone.pos_embed"])
    assert all(torch.equal(target[f"heads.{task}.weight"], base[f"heads.{task}.weight"]) for task in (1, 2, 3, 4))


def test_counts_are_those_of_task_head_and_support_head(closed: Seen) -> None:
    experience = closed.experience
    target, base, tuned = (m.state_dict() for m in (closed.target, experience.base, experience.expert))
    moved = {name: target[name] + tuned[name] - base[name] for name in experience.shared}
    by_hand = deepcopy(closed.target)
    by_hand.load_state_dict({**target, **moved, **heads_of(experience.expert, 1)})
    (counts,) = evaluate(by_hand, closed.cell.stream.folds[0].evals, torch.device("cpu"))
    assert closed.results["counts"] == [[[list(pair) for pair in counts.groups]]]


def test_class_embeddings_are_orthogonal_shared_by_both_releases_and_never_trained(opened: Seen) -> None:
    experience = opened.experience
    assert experience.private == frozenset()
    head = experience.base.head(0)
    gram = head.weight @ head.weight.T
    assert torch.allclose(gram, gram[0, 0] * torch.eye(10), atol=1e-5)
    assert float(gram[0, 0].detach()) > 0
    for model in (opened.target, experience.expert):
        assert torch.equal(model.head(0).weight, head.weight)
        assert torch.equal(model.head(0).bias, torch.zeros(10))
    ends = [model.state_dict()["backbone.patch_embed.weight"] for model in (opened.target, experience.base, experience.expert)]
    assert all(not torch.equal(one, other) for one, other in combinations(ends, 2))


def test_class_embeddings_are_those_of_every_base_and_fit_into_the_features(opened: Seen) -> None:
    assert torch.equal(opened.target.head(0).weight, class_embeddings(10, opened.target.width))
    assert torch.equal(class_embeddings(3, 8), class_embeddings(5, 8)[:3])  # a class more leaves the others
    with pytest.raises(InputError, match="expected at most 8 classes for features of that width, got 9"):
        class_embeddings(9, 8)


def test_a_stream_without_a_release_has_none_to_give(registry: Registry, cache: Cache, tmp_path: Path, closed: Seen) -> None:
    bare = replace(closed.cell, stream=replace(closed.cell.stream, release=None))
    with pytest.raises(InputError, match="expected a stream with a new release of its base, got short-digits-releases"):
        CellRun(bare, registry, tmp_path, cache, "cpu", 30.0).release()
    assert bare.stream.release_sha256 == ""


def test_making_base_release_and_expert_is_not_the_cells_own_time(registry: Registry, tmp_path: Path) -> None:
    cell = planned(registry, "carrier", "short-digits-releases").cells[0]
    attempt = CellRun(cell, registry, tmp_path, Cache(tmp_path / "cache"), "cpu", 30.0)
    started = time.monotonic()
    attempt.results()
    wall = time.monotonic() - started
    assert attempt.bases.seconds > 0.1
    assert attempt.context.cost.experts_trained == 1
    assert attempt.seconds() < wall - attempt.bases.seconds  # the expert is taken out, too
