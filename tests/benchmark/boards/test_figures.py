"""Pictures of a board. Oracles: matplotlib's own reader, and geometry."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from matplotlib import image, rc_context

from shiftproof.benchmark.boards.figures import Look, _scatter, draw_board
from shiftproof.benchmark.boards.labels import Array, crosses, place_labels, spread
from shiftproof.benchmark.boards.leaderboard import build_board
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import RunRecord

MakeRecord = Callable[..., RunRecord]


@pytest.fixture
def records(make_record: MakeRecord) -> list[RunRecord]:
    made = [make_record(name, seed) for name in ("er", "sgd") for seed in range(3)]
    made += [make_record("er", seed, config={"note": "$x_1$"}) for seed in range(3)]
    made += [make_record("gdro", seed, uses_group_labels=True) for seed in range(3)]
    made += [make_record("joint", seed, [[[(80, 100)], [(70, 100)]]], experiences=["joint"]) for seed in range(3)]
    return [*made, make_record("nan", 0, failed=True)]


def test_pictures_are_the_same_to_the_byte_and_hold_no_metadata(records: list[RunRecord], tmp_path: Path) -> None:
    board = build_board("b", records)
    first = draw_board(board, records, tmp_path)
    with rc_context({"font.size": 20, "axes.facecolor": "red"}):
        second = draw_board(board, records[::-1], tmp_path)
    stem = "b-b-digits-1-recipe-standard"
    assert [path.name for path in first] == [f"{stem}-worst-average.png", f"{stem}-sequence.png"]
    assert first == second
    for content in first.values():
        assert b"tEXt" not in content
        pixels = image.imread(io.BytesIO(content))
        assert pixels.shape[1] >= 1400
        assert 0.005 < float((pixels[..., :3].min(2) < 0.6).mean()) < 0.5  # something is drawn, on a light ground


def test_half_a_character_is_drawn_as_a_space(make_record: MakeRecord, tmp_path: Path) -> None:
    def drawn(note: str) -> list[bytes]:
        records = [make_record("er"), make_record("er", config={"note": note})]
        return list(draw_board(build_board("b", records), records, tmp_path).values())

    assert drawn("caf\udce9") == drawn("caf ")


def test_a_section_without_an_order_of_tasks_has_no_sequence(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [make_record("er", seed, [[[(80, 100), (60, 100)]]], scenario="offline") for seed in range(2)]
    (path,) = draw_board(build_board("b", records), records, tmp_path)
    assert path.name.endswith("-worst-average.png")


@pytest.mark.parametrize("average", [0.004, 0.5, 0.999])
def test_bars_and_axes_stay_within_what_an_accuracy_can_be(average: float) -> None:
    def summary(mean: float, half: float) -> dict[str, Any]:
        return {"mean": mean, "interval": {"low": mean - half, "high": mean + half, "method": "t"}, "pooled_interval": None}

    looks = [Look(name, "#0072B2", "o", "-", False) for name in ("a", "b")]
    points = [(summary(average, 0.03), summary(worst, 0.2), look) for worst, look in zip((0.01, 0.95), looks, strict=True)]
    (axes,) = _scatter({"title": "t"}, points).axes
    bars = np.concatenate([path.vertices for lines in axes.collections for path in lines.get_paths()])
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert (bottom, top, bars.min(), bars.max()) == (0.0, 100.0, 0.0, 100.0)
    assert 0 <= left <= 100 * average <= right <= 100
    assert right - left >= 4


def test_a_point_without_an_interval_is_explained(make_record: MakeRecord) -> None:
    """Of two seeds only the pooled interval can be told, and that is of ranked rows."""
    ranked = [make_record(name, seed, [[[(50 + seed, 100)]]]) for name in ("er", "sgd", "lws") for seed in range(2)]
    told = [make_record("gdro", seed, [[[(60 + seed, 100)]]], uses_group_labels=True) for seed in range(2)]

    def caption(records: list[RunRecord]) -> str:
        (section,) = build_board("b", records)["sections"]
        look = Look("a", "#0072B2", "o", "-", False)
        return _scatter(
            section, [(row["metrics"]["average"], row["metrics"]["worst"], look) for row in section["rows"]]
        ).get_supxlabel()

    assert "too few seeds, and not ranked" not in caption(ranked)
    assert "too few seeds, and not ranked" in caption([*ranked, *told])


def test_a_section_in_which_everything_failed_is_not_drawn(make_record: MakeRecord, tmp_path: Path) -> None:
    records = [make_record("nan", 0, failed=True)]
    assert draw_board(build_board("b", records), records, tmp_path) == {}


def test_sections_with_long_titles_have_files_of_their_own(make_record: MakeRecord, tmp_path: Path) -> None:
    knobs = {f"a_knob_with_a_long_name_{place}": 0.5 for place in range(8)}
    changes = [{"knobs": knobs | {"z": z}, "custom": True, "scenario": "offline"} for z in (1, 2)]
    records = [make_record("er", counts=[[[(80, 100), (60, 100)]]], **change) for change in changes]
    records += [make_record("er", counts=[[[(80, 100), (60, 100)]]], scenario="offline")]
    files = draw_board(build_board("b", records), records, tmp_path)
    assert len(files) == 3
    assert max(len(path.name) for path in files) < 160


def test_a_missing_record_is_named(records: list[RunRecord], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"expected all 16 records of the board .* none of run {records[0].run_id}"):
        draw_board(build_board("b", records), records[1:], tmp_path)


def overlap(boxes: Array) -> float:
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low).clip(min=0).prod(2)
    np.fill_diagonal(shared, 0)
    return float(shared.sum())


@pytest.mark.parametrize("seed", range(5))
def test_18_labels_avoid_each_other_the_points_and_the_edge(seed: int) -> None:
    points = np.random.Generator(np.random.PCG64(seed)).uniform((40, 40), (460, 360), (18, 2))
    sizes = np.tile([60.0, 10.0], (18, 1))
    corners = place_labels(points, sizes, crosses(points, points - 10, points + 10, 1.0), np.array([0.0, 0.0, 500.0, 400.0]))
    boxes = np.concatenate([corners, corners + sizes], 1)
    assert overlap(boxes) == 0
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 500).all()
    distance = np.hypot(*(np.clip(points, boxes[:, :2], boxes[:, 2:]) - points).T)
    assert distance.max() < 40


def test_crosses_are_boxes_around_markers_and_bars() -> None:
    boxes = crosses(np.array([[10.0, 20.0]]), np.array([[5.0, 18.0]]), np.array([[16.0, 25.0]]), 2.0)
    assert boxes.tolist() == [[3, 13, 17, 27]] * 3 + [[5, 18, 16, 22], [8, 18, 12, 25]]


def test_labels_of_identical_points_do_not_overlap() -> None:
    points = np.full((6, 2), 250.0)
    sizes = np.tile([60.0, 10.0], (6, 1))
    corners = place_labels(points, sizes, np.zeros((0, 4)), np.array([0.0, 0.0, 500.0, 500.0]))
    assert overlap(np.concatenate([corners, corners + sizes], 1)) == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_spread_heights_keep_their_order_their_distance_and_the_frame(heights: list[float]) -> None:
    moved = spread(np.array(heights), gap=5.0, low=0.0, high=100.0)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(moved[order]) >= 5.0 - 1e-9).all()
    assert moved.min() >= 0
    assert moved.max() <= 100 + 1e-9


def test_heights_that_are_far_apart_stay_where_they_are() -> None:
    assert spread(np.array([90.0, 10.0, 50.0]), 5.0, 0.0, 100.0).tolist() == [90.0, 10.0, 50.0]
