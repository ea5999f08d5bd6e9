"""Leave one rendition of the digits out: what the stream holds, and who sees what."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from shiftproof.benchmark import ArrayData, DataExperience, Scenario, Stream
from shiftproof.datasets.digits_domains import DomainsConfig, digits_domains, parts
from shiftproof.datasets.domains import DOMAINS, hatched, neighbourhood, outline, plain, slanted, thick
from shiftproof.datasets.splits import digits, split

# Any change of the pictures or of their order shows here; boards made before are then void.
DATA_SHA256 = "4ae6b3f2374b71031e2ca9ed15182f73ba01be20f4454e65192ea4591525e96a"


@pytest.fixture(scope="module")
def stream() -> Stream:
    return digits_domains(DomainsConfig())


def pictures(stream: Stream) -> dict[str, ArrayData]:
    return {one.name: one.train for fold in stream.folds for one in fold.train if isinstance(one, DataExperience)}


def test_every_domain_is_held_out_once_and_the_others_are_learned(stream: Stream) -> None:
    assert stream.scenario is Scenario.LEAVE_ONE_DOMAIN_OUT
    assert len(stream.folds) == len(DOMAINS) >= 5
    for fold in stream.folds:
        assert [one.name for one in fold.train] == [name for name in DOMAINS if name != fold.name]
        assert [one.index for one in fold.train] == list(range(len(DOMAINS) - 1))
        assert [one.name for one in fold.evals] == [fold.name]
        assert fold.target is not None
        assert fold.target.name == fold.name


def test_the_pixels_are_the_same_on_every_machine(stream: Stream) -> None:
    assert stream.data_sha256 == DATA_SHA256


def test_base_experts_and_test_share_no_digit() -> None:
    base, rest, held_out = parts(DomainsConfig())
    assert all(not set(one.tolist()) & set(other.tolist()) for one, other in combinations((base, rest, held_out), 2))
    assert len(base) + len(rest) + len(held_out) == 1797
    assert set(held_out.tolist()) == set(np.flatnonzero(split(0).held_out).tolist())


def test_the_base_sees_no_held_out_digit_and_no_rendition_of_a_domain(stream: Stream) -> None:
    assert stream.base_data is not None
    seen = {x.numpy().tobytes() for x in stream.base_data.x}
    for fold in stream.folds:
        ((_, test),) = fold.evals[0].parts
        assert fold.target is not None
        assert not seen & {x.numpy().tobytes() for x in torch.cat([test.x, fold.target.train.x])}
    base, _, held_out = parts(DomainsConfig())
    assert torch.equal(stream.base_data.y, torch.from_numpy(digits()[1][base]))
    assert not set(base.tolist()) & set(held_out.tolist())
    # Each domain differs from what the base sees of the same digit by more than what noise, light and place explain.
    grey = np.random.default_rng(0).integers(0, 2, (4, 16, 16)).astype(np.uint8) * 255
    still = np.zeros((4, 3, 16, 16), np.int16)
    shown = plain(grey, still).mean(1)
    for name, rendition in DOMAINS.items():
        drawn = rendition(grey, still)
        same_light = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(drawn.mean(1), shown, strict=True)]
        coloured = np.ptp(drawn, axis=1).max() > 0
        assert max(same_light) < 0.99 or coloured or drawn.min() > 100, name
    assert stream.unlabelled()[0] is stream.base_data.x  # a self-supervised base sees no more


def test_labels_are_those_of_the_digits_and_all_ten_occur_everywhere(stream: Stream) -> None:
    _, rest, held_out = parts(DomainsConfig())
    _, labels = digits()
    for fold in stream.folds:
        ((_, test),) = fold.evals[0].parts
        assert test.y.tolist() == labels[held_out].tolist()
        assert fold.target is not None
        assert fold.target.train.y.tolist() == labels[rest].tolist()
        assert set(test.y.tolist()) == set(range(10))


def test_domains_shift_and_sprinkle_each_digit_in_their_own_way(stream: Stream) -> None:
    frozen, (_, rest, _) = split(0), parts(DomainsConfig())
    rows = [frozen.noise_index[row, rest] for row in range(len(DOMAINS))]
    assert all((one != other).mean() > 0.9 for one, other in combinations(rows, 2))


@pytest.mark.parametrize("knobs", [{"split_seed": 3}, {"noise": 20}, {"shift": 0}, {"base_samples": 300}])
def test_a_knob_changes_the_data(stream: Stream, knobs: dict[str, int]) -> None:
    assert digits_domains(replace(DomainsConfig(), **knobs)).data_sha256 != stream.data_sha256


def test_brightest_and_darkest_neighbours_are_scipys() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (3, 16, 16)).astype(np.uint8)
    for picture, around in zip(grey, neighbourhood(grey), strict=True):
        assert (around.max(-1) == ndimage.maximum_filter(picture, 3, mode="nearest")).all()
        assert (around.min(-1) == ndimage.minimum_filter(picture, 3, mode="nearest")).all()


def test_a_dot_is_thickened_outlined_hatched_and_slanted() -> None:
    dot = np.zeros((1, 16, 16), np.uint8)
    dot[0, 12, 8] = 255
    still = np.zeros((1, 3, 16, 16), np.int16)
    assert (thick(dot, still)[0, 0] > 128).sum() == 9
    contour = outline(dot, still)[0, 0]
    assert contour[12, 8] < contour[12, 7] == contour[11, 8]
    strokes = [int(hatched(np.roll(dot, step, axis=2), still).max() > 0) for step in range(4)]
    assert strokes == [1, 1, 0, 0]  # 12 + 8 is a multiple of 4
    assert np.argwhere(slanted(dot, still)[0, 0] > 0).tolist() == [[12, 6]]


def test_the_committed_board_keeps_within_the_bounds_of_the_calibration() -> None:
    folder = Path(__file__).parents[2] / "leaderboards" / "runs" / "domains" / "records"
    records = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    seen: dict[str, list[float]] = {"zero-shot": [], "experts": []}
    for record in records:
        if record["label"] in seen:
            seen[record["label"]].append(record["metrics"]["average"]["value"])
    assert len(seen["zero-shot"]) == len(seen["experts"]) == 3 * len(DOMAINS)
    assert max(seen["zero-shot"]) <= 0.6
    assert min(seen["experts"]) >= 0.9
