"""What the streams on the digits hold."""

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from shiftproof.benchmark import EvalSet, GroupedExperience, InputError, Scenario, Stream
from shiftproof.benchmark.config import check_type, resolve
from shiftproof.datasets.digits import TASKS, BiasedDigitsConfig, DigitsConfig, shiftproof_streams

# Any change of the pictures, of their order or of the groups shows here; boards made before are then void.
B_DIGITS_SHA256 = "666ad56888422ece12e06ebe32e8c4848cf367e62b4c8d116e4bc4bb1a4cb8b7"
SPLIT_DIGITS_SHA256 = "4dcc2f9040c7e702de7a2b64cee9c72ad420701793dc7282be61e7e64755a55f"

SPECS = {spec.name: spec for spec in shiftproof_streams()}


def build(name: str, **knobs: object) -> Stream:
    return SPECS[name].build(replace(SPECS[name].config(), **knobs), None)


def grouped(stream: Stream) -> list[GroupedExperience]:
    return [experience for experience in stream.folds[0].train if isinstance(experience, GroupedExperience)]


def pixels(eval_set: EvalSet) -> Tensor:
    ((_, data),) = eval_set.parts
    return data.x


INKS = ("red green", "blue yellow", "magenta cyan", "orange azure")  # of tasks 0 to 3, and of 4 to 7 again
CHANNELS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "magenta": (1, 0, 1),
    "cyan": (0, 1, 1),
    "orange": (1, 0.5, 0),
    "azure": (0, 0.5, 1),
}


def decode_ink(x: Tensor, axis: int) -> Tensor:
    """0 or 1, which of the two inks of an axis a picture's mean colour leans towards once its grey part is taken off."""
    colour = x.double().sum(dim=(2, 3))
    inks = torch.tensor([CHANNELS[name] for name in INKS[axis].split()], dtype=torch.float64)
    leaning = (colour - colour.mean(1, keepdim=True)) @ (inks - inks.mean(1, keepdim=True)).T
    return leaning.argmax(dim=1)


@pytest.fixture(scope="module")
def biased() -> Stream:
    return build("b-digits")


def test_questions_differ_on_at_least_three_digits_and_agree_on_at_least_two() -> None:
    answers = [[digit in yes for digit in range(10)] for yes in TASKS.values()]
    agreements = [sum(np.equal(a, b)) for a, b in combinations(answers, 2)]
    assert len(TASKS) == 8
    assert (min(agreements), max(agreements)) == (2, 7)


def test_the_table_in_the_readme_lists_the_tasks_and_their_sizes(biased: Stream) -> None:
    readme = (Path(__file__).parents[2] / "datasets" / "README.md").read_text(encoding="utf-8")
    counts = biased.counts()
    for task, (name, yes) in enumerate(TASKS.items()):
        train, test = counts["train"][f"all/{name}"], counts["eval"][f"all/{name}"]
        assert f"| {task} | `{name}` | {' '.join(map(str, yes))} | {train} | {test} |" in readme


def test_streams_have_the_names_and_tasks_they_announce() -> None:
    assert set(SPECS) == {"b-digits", "split-digits", "split-digits-class", *(f"digits-offline-{name}" for name in TASKS)}
    for name, spec in SPECS.items():
        stream = build(name)
        assert (stream.name, stream.tier, stream.licence) == (name, spec.tier, spec.licence)
        assert [e.name for e in stream.folds[0].train] == [e.name for e in stream.folds[0].evals]
        assert [e.index for e in stream.folds[0].train] == list(range(len(stream.folds[0].train)))
        assert {e.task for e in grouped(stream)} == set(stream.heads) == {e.parts[0][0] for e in stream.folds[0].evals}


def test_pictures_are_uint8_rgb(biased: Stream) -> None:
    for experience, eval_set in zip(grouped(biased), biased.folds[0].evals, strict=True):
        assert experience.train.x.dtype == pixels(eval_set).dtype == torch.uint8
        assert experience.train.x.shape[1:] == pixels(eval_set).shape[1:] == (3, 16, 16)


def test_training_labels_are_balanced_in_every_task(biased: Stream) -> None:
    for experience in grouped(biased):
        no, yes = torch.bincount(experience.train.y).tolist()
        assert no == yes > 490


def test_labels_answer_the_question_of_the_task() -> None:
    bunch = load_digits()
    label_of = {picture.tobytes(): label for picture, label in zip(bunch.images.astype(np.uint8), bunch.target, strict=True)}
    bare = build("b-digits", noise=0, shift=0, saturation=0, size=8)  # scikit-learn's own pixels, in white
    for experience, question in zip(grouped(bare), TASKS.values(), strict=True):
        levels = np.rint(experience.train.x[:, 0].numpy() * (16 / 255)).astype(np.uint8)
        labels = [label_of[picture.tobytes()] for picture in levels]
        assert [int(label in question) for label in labels] == experience.train.y.tolist()


@pytest.mark.parametrize("p_corr", [0.5, 0.8, 0.9, 0.95, 1.0])
def test_the_share_of_aligned_samples_is_p_corr_for_either_label(p_corr: float) -> None:
    for experience in grouped(build("b-digits", p_corr=p_corr)):
        counts = torch.bincount(experience.groups, minlength=4).tolist()
        per_label = sum(counts) // 2
        assert counts[0] == counts[3] == int(p_corr * per_label) == pytest.approx(p_corr * per_label)


def test_groups_are_twice_the_label_plus_the_ink_that_the_pixels_show(biased: Stream) -> None:
    for experience in grouped(biased):
        ink = decode_ink(experience.train.x, experience.task % 4)
        assert torch.equal(experience.groups, 2 * experience.train.y + ink)


def test_ink_is_independent_of_the_label_at_p_corr_one_half() -> None:
    for experience in grouped(build("b-digits", p_corr=0.5)):
        ink = decode_ink(experience.train.x, experience.task % 4).double()
        assert torch.corrcoef(torch.stack([ink, experience.train.y.double()]))[0, 1].abs() < 1e-9


def test_raising_p_corr_only_repaints_conflicting_samples() -> None:
    less, more = grouped(build("b-digits", p_corr=0.8))[3], grouped(build("b-digits", p_corr=0.95))[3]
    repainted = less.groups != more.groups
    assert torch.equal(less.train.y, more.train.y)
    assert torch.isin(more.groups[repainted], torch.tensor([0, 3])).all()
    assert torch.equal(less.train.x[~repainted], more.train.x[~repainted])


def test_position_in_the_training_set_does_not_tell_the_ink(biased: Stream) -> None:
    for experience in grouped(biased):
        conflicting = torch.isin(experience.groups, torch.tensor([1, 2])).double()
        position = torch.arange(len(conflicting)).double()
        # Under independence the coefficient has a standard deviation of about 1 / sqrt(1000).
        assert torch.corrcoef(torch.stack([conflicting, position]))[0, 1].abs() < 0.12


def test_the_four_groups_of_every_test_set_are_equally_large(biased: Stream) -> None:
    for eval_set in biased.folds[0].evals:
        counts = torch.bincount(eval_set.groups, minlength=4)
        assert counts.min() == counts.max() > 200
        assert eval_set.group_names == ("y0-z0", "y0-z1", "y1-z0", "y1-z1")


def test_every_test_digit_comes_in_both_inks() -> None:
    for eval_set in build("b-digits", noise=0, colour_axes=1).folds[0].evals:
        red, green = pixels(eval_set).chunk(2)
        assert torch.equal(red[:, 0], green[:, 1])
        assert red[:, 1:].max() == green[:, ::2].max() == 0


def test_both_renditions_of_a_test_digit_carry_the_same_noise() -> None:
    for eval_set in build("b-digits", colour_axes=1).folds[0].evals:
        red, green = pixels(eval_set).chunk(2)
        assert torch.equal(red[:, 2], green[:, 2])  # neither ink has blue: this is the noise alone
        assert red[:, 2].max() > 0
        assert torch.equal(decode_ink(pixels(eval_set), 0), eval_set.groups % 2)


def test_training_and_test_digits_are_disjoint() -> None:
    stream = build("b-digits", noise=0, shift=0, saturation=0, size=8)
    train = {picture.numpy().tobytes() for experience in grouped(stream) for picture in experience.train.x}
    test = {picture.numpy().tobytes() for eval_set in stream.folds[0].evals for picture in pixels(eval_set)}
    assert train.isdisjoint(test)
    assert len(train) == 1258
    assert len(test) == 539


def test_an_offline_stream_is_the_experience_of_b_digits(biased: Stream) -> None:
    for task, name in enumerate(TASKS):
        alone = build(f"digits-offline-{name}")
        (experience,), (eval_set,) = grouped(alone), alone.folds[0].evals
        twin, twin_eval = grouped(biased)[task], biased.folds[0].evals[task]
        assert (alone.scenario, alone.heads, experience.task) == (Scenario.OFFLINE, {task: 2}, twin.task)
        assert experience.train.sha256() == twin.train.sha256()
        assert torch.equal(experience.groups, twin.groups)
        assert eval_set.parts[0][1].sha256() == twin_eval.parts[0][1].sha256()
        assert torch.equal(eval_set.groups, twin_eval.groups)


def test_global_seeds_do_not_change_the_data(biased: Stream) -> None:
    torch.manual_seed(1234)
    np.random.seed(1234)
    random.seed(1234)
    assert build("b-digits").data_sha256 == biased.data_sha256


def test_default_data_are_the_published_ones(biased: Stream) -> None:
    assert biased.data_sha256 == B_DIGITS_SHA256
    assert build("split-digits").data_sha256 == SPLIT_DIGITS_SHA256


@pytest.mark.parametrize(
    "knob",
    [
        {"p_corr": 0.9},
        {"split_seed": 1},
        {"size": 24},
        {"noise": 27},
        {"shift": 2},
        {"colour_axes": 2},
        {"alternate_sign": True},
        {"saturation": 128},
    ],
    ids=str,
)
def test_every_knob_changes_the_data(biased: Stream, knob: dict[str, object]) -> None:
    changed = build("b-digits", **knob)
    assert changed.data_sha256 != biased.data_sha256
    assert (changed.split_sha256 != biased.split_sha256) == (set(knob) <= {"p_corr", "split_seed"})


@pytest.mark.parametrize("split_seed", [1, 2])
def test_another_split_seed_holds_out_other_digits_as_many_of_every_class(split_seed: int) -> None:
    frozen, other = build("split-digits-class"), build("split-digits-class", split_seed=split_seed)
    assert frozen.counts() == other.counts()
    assert frozen.split_sha256 != other.split_sha256


def test_alternating_the_sign_swaps_the_inks_of_every_second_task(biased: Stream) -> None:
    for one, other in zip(grouped(biased), grouped(build("b-digits", alternate_sign=True)), strict=True):
        swapped = one.groups ^ (one.task % 2)
        assert torch.equal(other.groups, swapped)
        assert torch.equal(decode_ink(other.train.x, other.task % 4), swapped % 2)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_colour_axes_cycle_over_the_tasks(axes: int) -> None:
    for experience in grouped(build("b-digits", colour_axes=axes, p_corr=1.0)):
        assert torch.equal(decode_ink(experience.train.x, experience.task % axes), experience.groups % 2)


def test_without_saturation_both_inks_are_the_same() -> None:
    eval_set = build("digits-offline-even", saturation=0).folds[0].evals[0]
    first, second = pixels(eval_set).chunk(2)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", TASKS)
def test_a_linear_model_on_grey_pictures_learns_every_task(name: str) -> None:
    stream = build(f"digits-offline-{name}", colour_axes=1)
    (experience,), (eval_set,) = grouped(stream), stream.folds[0].evals
    # Red, green and blue count alike: the two inks are equally grey, the model sees shape alone.
    grey = [x.double().mean(dim=1).flatten(1).numpy() / 255 for x in (experience.train.x, pixels(eval_set))]
    fitted = LogisticRegression(C=0.5, max_iter=2000).fit(grey[0], experience.train.y.numpy())
    assert fitted.score(grey[1], eval_set.parts[0][1].y.numpy()) > 0.7


def test_split_digits_takes_every_digit_and_has_classes_as_groups() -> None:
    stream = build("split-digits")
    assert (stream.scenario, dict(stream.heads)) == (Scenario.TASK_INCREMENTAL, dict.fromkeys(range(5), 2))
    assert sum(sum(counts.values()) for counts in stream.counts().values()) == 1797
    for step, (experience, eval_set) in enumerate(zip(grouped(stream), stream.folds[0].evals, strict=True)):
        assert torch.equal(experience.groups, experience.train.y)
        assert torch.equal(eval_set.groups, eval_set.parts[0][1].y)
        assert eval_set.group_names == (f"digit-{2 * step}", f"digit-{2 * step + 1}")


def test_split_digits_class_shares_one_head_over_the_same_pictures() -> None:
    own, shared = build("split-digits"), build("split-digits-class")
    assert (shared.scenario, dict(shared.heads)) == (Scenario.CLASS_INCREMENTAL, {0: 10})
    for step, (a, b) in enumerate(zip(grouped(own), grouped(shared), strict=True)):
        assert torch.equal(a.train.x, b.train.x)
        assert torch.equal(a.train.y + 2 * step, b.train.y)
        assert torch.equal(b.groups, b.train.y)
    for a_eval, b_eval in zip(own.folds[0].evals, shared.folds[0].evals, strict=True):
        assert torch.equal(a_eval.groups, b_eval.groups)


def test_the_harness_accepts_the_configs_and_refuses_values_out_of_range() -> None:
    check_type(BiasedDigitsConfig)
    check_type(DigitsConfig)
    for knob, value in [("p_corr", "1.01"), ("size", "20"), ("saturation", "256"), ("colour_axes", "5"), ("split_seed", "-1")]:
        with pytest.raises(InputError, match=knob):
            resolve(BiasedDigitsConfig(), [(knob, value)])
