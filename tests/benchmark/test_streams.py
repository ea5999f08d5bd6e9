"""Streams, folds and the hashes that identify data and bases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shiftproof.benchmark import (
    ArrayData,
    BaseRecipe,
    DataExperience,
    EvalSet,
    Fold,
    GroupedExperience,
    Scenario,
    Stream,
    sequential,
)
from shiftproof.benchmark.registry.lookup import Registry


@pytest.fixture
def stream(registry: Registry) -> Stream:
    spec = registry.stream("tiny")
    return spec.build(spec.config(), None)


def altered(stream: Stream, **changes: Any) -> Stream:
    """The stream with its first experience changed."""
    fold = stream.folds[0]
    return replace(stream, folds=(replace(fold, train=(replace(fold.train[0], **changes), *fold.train[1:])),))


def one_more(tensor: torch.Tensor) -> torch.Tensor:
    other = tensor.clone()
    other.view(-1)[3] = 1 - other.view(-1)[3].clamp(max=1)
    return other


def test_the_data_hash_is_of_content_and_the_same_for_the_same_content(stream: Stream, registry: Registry) -> None:
    again = registry.stream("tiny").build(registry.stream("tiny").config(), None)
    assert stream.data_sha256 == again.data_sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda one: {"train": ArrayData(one_more(one.train.x), one.train.y)},
        lambda one: {"train": ArrayData(one.train.x, one_more(one.train.y))},
        lambda one: {"train": ArrayData(one.train.x.float(), one.train.y)},
        lambda one: {"train": ArrayData(one.train.x.transpose(2, 3).reshape(48, 3, 4, 16), one.train.y)},
        lambda one: {"groups": one_more(one.groups)},
        lambda one: {"task": 1},
        lambda one: {"name": "other"},
    ],
    ids=["pixel", "label", "dtype", "shape", "group", "task", "name"],
)
def test_every_change_of_the_training_data_changes_the_data_hash(
    stream: Stream, change: Callable[[Any], dict[str, Any]]
) -> None:
    assert altered(stream, **change(stream.folds[0].train[0])).data_sha256 != stream.data_sha256


def test_every_change_of_an_eval_set_changes_the_data_hash(stream: Stream) -> None:
    fold = stream.folds[0]
    first = fold.evals[0]
    data = first.parts[0][1]
    for change in (
        {"groups": one_more(first.groups)},
        {"parts": ((1, data),)},
        {"parts": ((0, ArrayData(one_more(data.x), data.y)),)},
    ):
        evals = (replace(first, **change), *fold.evals[1:])
        assert replace(stream, folds=(replace(fold, evals=evals),)).data_sha256 != stream.data_sha256


def test_the_base_hash_is_of_its_recipe_and_of_the_inputs_that_it_may_see(stream: Stream) -> None:
    inputs = {"train": ArrayData(one_more(stream.folds[0].train[0].train.x), stream.folds[0].train[0].train.y)}  # type: ignore[union-attr]
    assert altered(stream, **inputs).base_sha256 == stream.base_sha256  # a random base sees none
    learned = replace(stream, base=replace(stream.base, kind="barlow-twins"))
    assert altered(learned, **inputs).base_sha256 != learned.base_sha256
    labels = {"train": ArrayData(learned.folds[0].train[0].train.x, one_more(learned.folds[0].train[0].train.y))}  # type: ignore[union-attr]
    assert altered(learned, **labels).base_sha256 == learned.base_sha256  # and none of them labels
    hashes = {
        replace(stream, base=replace(stream.base, **change)).base_sha256
        for change in ({}, {"seed": 1}, {"backbone": "resnet18"}, {"kind": "barlow-twins"}, {"lr": 0.5})
    }
    assert len(hashes) == 5
    assert replace(stream, backbone_sha256="1").base_sha256 != stream.base_sha256


def test_the_hash_of_a_base_in_a_file_is_of_its_content_and_not_of_its_folder(stream: Stream, tmp_path: Path) -> None:
    def hashed(folder: str, content: bytes) -> str:
        path = tmp_path / folder / "base.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return replace(stream, base=BaseRecipe("digits-cnn", "file", file=str(path))).base_sha256

    assert hashed("a", b"1") == hashed("b", b"1") != hashed("a", b"2")


def test_counts_input_shape_and_unlabelled_inputs_are_those_of_the_arrays(stream: Stream) -> None:
    assert stream.counts() == {
        "train": {"all/task-0": 48, "all/task-1": 48},
        "eval": {"all/task-0": 40, "all/task-1": 40},
    }
    assert stream.input_shape == (3, 8, 8)
    assert [x.shape for x in stream.unlabelled()] == [(48, 3, 8, 8)] * 2


def test_a_fold_is_found_by_name(stream: Stream) -> None:
    assert stream.fold("all") is stream.folds[0]
    with pytest.raises(KeyError):
        stream.fold("some")


def test_folds_experiences_and_eval_sets_have_names_of_their_own(stream: Stream) -> None:
    fold = stream.folds[0]
    with pytest.raises(ValueError, match="expected folds with different names"):
        replace(stream, folds=(fold, fold))
    with pytest.raises(ValueError, match="expected folds with different names"):
        replace(stream, folds=())
    with pytest.raises(ValueError, match="expected experiences with different names"):
        sequential([fold.train[0], fold.train[0]], fold.evals)
    with pytest.raises(ValueError, match="expected eval sets with different names"):
        Fold("all", fold.train, ())


def test_only_incremental_scenarios_have_an_order() -> None:
    assert {scenario.value for scenario in Scenario if scenario.ordered} == {"task-incremental", "class-incremental"}


def data(count: int = 4) -> ArrayData:
    return ArrayData(torch.zeros(count, 3), torch.zeros(count, dtype=torch.int64))


def test_arrays_of_another_type_or_length_are_refused() -> None:
    x, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected N inputs and N targets"):
        ArrayData(x, y[:3])
    with pytest.raises(TypeError, match="expected uint8 or float32 inputs and int64 targets"):
        ArrayData(x.double(), y)
    with pytest.raises(TypeError, match="expected uint8 or float32"):
        ArrayData(x, y.int())


def test_groups_that_do_not_fit_are_refused() -> None:
    groups = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected one group for each of 4 samples"):
        GroupedExperience(0, "a", 0, data(), groups[:3])
    with pytest.raises(ValueError, match=r"group labels must lie in \[0, 1\)"):
        EvalSet("a", ((0, data()),), groups + 1, ("g",))
    with pytest.raises(ValueError, match=r"expected 4 \(more than 0\) group labels, got 3"):
        EvalSet("a", ((0, data()),), groups[:3], ("g",))
    with pytest.raises(ValueError, match=r"expected 0 \(more than 0\) group labels, got 0"):
        EvalSet("a", (), groups[:0], ("g",))


def test_inputs_are_scaled_to_one_and_never_a_view_of_what_is_stored() -> None:
    bytes_ = ArrayData(torch.tensor([[0], [51], [255]], dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert bytes_.inputs(slice(0, 3)).flatten().tolist() == pytest.approx([0, 0.2, 1])
    floats = data()
    for index in (slice(0, 2), torch.tensor([0, 1])):
        floats.inputs(index).fill_(9)
    assert not floats.x.any()


def test_tasks_of_an_ordinary_experience_are_all_its_own() -> None:
    assert DataExperience(0, "a", 7, data()).tasks(torch.tensor([1, 0, 2])).tolist() == [7, 7, 7]
