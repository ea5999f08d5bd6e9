"""The experts of a stream. Oracle: the harness, whose merges must find the same ones in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shiftproof.benchmark import DataExperience, Stream, leave_one_domain_out
from shiftproof.benchmark.analysis.experts import StreamExperts, chosen, experts_of_stream
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experts.making import request_for
from shiftproof.benchmark.registry.lookup import Registry, load_registry
from shiftproof.benchmark.running.matrix import plan
from shiftproof.benchmark.running.runner import run_cell

TOYS = Path(__file__).parents[2] / "toys.py"
KNOBS = ("recipe.epochs=1", "stream.samples=24")


@pytest.fixture(scope="module")
def toys() -> Registry:
    return load_registry(("fine-tuning", "merging"), [TOYS])


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Names of the experts in a cache of the test's own."""
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path))
    return lambda: {file.name for file in (tmp_path / "expert").glob("*.safetensors")}


def found(registry: Registry, seed: int = 0, fold: str = "", stream: str = "tiny") -> StreamExperts:
    return experts_of_stream(registry, request_for(registry, stream, seed, fold, KNOBS))


def test_they_are_the_ones_that_a_merge_of_the_harness_is_given(
    toys: Registry, cached: Callable[[], set[str]], tmp_path: Path
) -> None:
    (cell,) = plan(toys, SuiteSpec("s", "made for a test", ("tiny",), ("weight-average",), (0,)), KNOBS).cells
    record = run_cell(cell, toys, tmp_path / "out")
    assert (record.status, record.cost["experts_trained"]) == ("finished", 2)
    before = cached()
    told: list[str] = []
    request = request_for(toys, "tiny", 0, "", KNOBS)
    experts = experts_of_stream(toys, request, progress=told.append)
    assert (len(before), cached()) == (2, before)
    assert told == list(experts.experts) == ["task-0", "task-1"]
    assert [one.name for one in experts.evals] == ["task-0", "task-1"]
    assert not any(path.name == "work" for path in (tmp_path / "out").iterdir())
    found(toys, seed=1)
    assert len(cached()) == 4  # another seed has experts of its own


def test_only_what_they_share_is_compared(toys: Registry, cached: Callable[[], set[str]]) -> None:
    deltas = found(toys).deltas()
    assert deltas.labels == ("task-0", "task-1")
    shared = [name for name in deltas.base.names() if deltas.is_shared(name)]
    assert {name.partition(".")[0] for name in shared} == {"backbone"}
    assert {name.partition(".")[0] for name in deltas.base.names()} == {"backbone", "heads"}
    assert all(bool(delta.any()) for name in shared[:2] for delta in deltas.read(name))


def lodo(stream: Stream) -> Stream:
    """Three domains of one task, each held out in turn."""
    first, second = (one for one in stream.folds[0].train if isinstance(one, DataExperience))
    domains = [
        DataExperience(i, name, 0, one.train) for i, (name, one) in enumerate({"p": first, "q": second, "r": first}.items())
    ]
    evals = [replace(stream.folds[0].evals[0], name=one.name) for one in domains]
    return replace(stream, folds=leave_one_domain_out(domains, evals), heads={0: 2}, evaluate="last")


@pytest.fixture
def domains(toys: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    spec = toys.streams["tiny"]
    monkeypatch.setitem(toys.streams, "domains", replace(spec, name="domains", build=lambda c, root: lodo(spec.build(c, root))))
    return toys


def test_without_a_fold_every_domain_has_its_expert_once_and_in_order(
    domains: Registry, cached: Callable[[], set[str]]
) -> None:
    every = found(domains, stream="domains")
    assert list(every.experts) == [one.name for one in every.evals] == ["p", "q", "r"]
    held_out = found(domains, stream="domains", fold="q")
    assert (list(held_out.experts), [one.name for one in held_out.evals]) == (["p", "r"], ["q"])
    assert len(cached()) == 3
    for name, one in held_out.experts.items():
        ours, theirs = one.expert.state_dict(), every.experts[name].expert.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert "heads.0.weight" in held_out.deltas().matrices()  # all share one head


def test_folds_with_other_data_under_one_name_are_not_mixed(
    toys: Registry, monkeypatch: pytest.MonkeyPatch, cached: Callable[[], set[str]]
) -> None:
    spec = toys.streams["tiny"]

    def two_folds(config: object, root: str | None) -> Stream:
        stream = spec.build(config, root)
        (fold,) = stream.folds
        first, second = fold.train
        return replace(stream, folds=(fold, replace(fold, name="again", train=(replace(second, name=first.name),))))

    monkeypatch.setitem(toys.streams, "splits", replace(spec, name="splits", build=two_folds))
    with pytest.raises(
        InputError, match="expected --fold, since 'task-0' is not the same data in all folds of tiny: all, again"
    ):
        found(toys, stream="splits")
    assert list(found(toys, stream="splits", fold="all").experts) == ["task-0", "task-1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", 0, ""), "expected the name of a stream, got 'nothing'"),
        (("tiny", -1, ""), "expected --seed of 0 or more, got -1"),
        (("tiny", 0, "none"), "expected the name of a fold of tiny, got 'none'"),
    ],
)
def test_what_is_not_there_is_named(toys: Registry, arguments: tuple[str, int, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        experts_of_stream(toys, request_for(toys, *arguments))


def test_knobs_have_scopes(toys: Registry) -> None:
    request = request_for(toys, "tiny", 3, "", ["samples=24"])
    assert (request.seed, request.knobs) == (3, (("samples", "24"),))
    with pytest.raises(InputError, match=r"expected a scope before \.gamma=1, got 'toy'"):
        request_for(toys, "tiny", 0, "", ["toy.gamma=1"])


def test_names_are_looked_up_with_the_nearest_spelling() -> None:
    known = {"outline": 1, "thick": 2}
    assert chosen("expert", known, ["thick", "outline"]) == [2, 1]
    with pytest.raises(InputError, match="expected the name of an expert, got 'outlin'; did you mean 'outline'"):
        chosen("expert", known, ["outlin"])
    with pytest.raises(InputError, match="expected every expert once, got 'thick' 2 times"):
        chosen("expert", known, ["thick", "thick"])
