"""Boards from synthetic records. Oracles: scipy and numpy on the counts, sums by hand, invariance, damage done on purpose."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from shiftproof.benchmark.boards.leaderboard import board_json, build_board, check_board, read_board, record_texts, validate
from shiftproof.benchmark.boards.verification import schema
from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.metrics import shiftproof_metrics
from shiftproof.benchmark.names import NAME
from shiftproof.benchmark.records import RecordStore, RunRecord, sha256

Board = dict[str, Any]


MakeRecord = Callable[..., RunRecord]


def one_task(*correct: int) -> list[Any]:
    """Counts of one experience and one eval set, of 100 samples a group."""
    return [[[(c, 100) for c in correct]]]


def rows(board: Board, section: int = 0) -> dict[str, Any]:
    return {f"{row['label']} {row['variant']}".strip(): row for row in board["sections"][section]["rows"]}


def texts(records: list[RunRecord]) -> dict[str, str]:
    return {record.run_id: record.to_json() for record in records}


@pytest.fixture
def records(make_record: MakeRecord) -> list[RunRecord]:
    """Three strategies, three seeds."""
    return [make_record(strategy, seed) for strategy in ("sgd", "er", "lws") for seed in range(3)]


# Numbers


def test_a_board_is_the_same_to_the_byte_whatever_the_order_of_records(
    make_record: MakeRecord, records: list[RunRecord]
) -> None:
    records += [make_record("nan", seed, failed=True) for seed in range(3)]
    expected = board_json(build_board("b", records))
    for seed in range(5):
        shuffled = random.Random(seed).sample(records, len(records))
        again = [RunRecord.from_json(record.to_json(), "r") for record in shuffled]
        assert board_json(build_board("b", again + again[:2])) == expected


def test_mean_std_and_interval_are_those_of_numpy_and_scipy(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("er", seed, one_task(50 + 7 * seed, 30 + seed**2)) for seed in range(4)])
    worst = rows(board)["er"]["metrics"]["worst"]
    values = np.array([0.30, 0.31, 0.34, 0.39])
    assert worst["values"] == pytest.approx(values)
    assert worst["mean"] == pytest.approx(values.mean())
    assert worst["std"] == pytest.approx(values.std(ddof=1))
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (worst["interval"]["low"], worst["interval"]["high"]) == pytest.approx((low, high), abs=1e-6)
    assert worst["interval"]["method"] == "Student t, 95%, 3 degrees of freedom"


def test_the_last_bit_of_somebodys_arithmetic_is_not_in_a_board(make_record: MakeRecord) -> None:
    def board(noise: float) -> Board:
        metric = MetricSpec("noisy", lambda scores: 1 / 3 + noise, True, "A third.", primary=True)
        return build_board("b", [make_record("er", seed) for seed in range(3)], [metric])

    assert board(0.0) == board(1e-15)
    assert rows(board(0.0))["er"]["metrics"]["noisy"]["mean"] == 0.333333333


def test_one_seed_has_neither_std_nor_intervals_nor_rank_ranges(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("er", 0, one_task(80)), make_record("sgd", 0, one_task(70))])
    summary = rows(board)["er"]["metrics"]["worst"]
    assert summary["rank"] == 1
    assert [summary[name] for name in ("std", "interval", "pooled_interval", "rank_range")] == [None] * 4


def test_the_pooled_interval_and_the_critical_difference_come_from_the_two_way_residuals(make_record: MakeRecord) -> None:
    correct = {"a": (50, 60, 61), "b": (70, 75, 86)}
    board = build_board(
        "b", [make_record(name, s, one_task(c)) for name, seeds in correct.items() for s, c in enumerate(seeds)]
    )
    # By hand: means 57 and 77, seeds 60, 67.5 and 73.5 around 67: residuals 0, 2.5 and -2.5, and their negatives.
    variance = 4 * 0.025**2 / 2
    how = board["sections"][0]["ranking"]["worst"]
    assert (how["residual_variance"], how["degrees"], how["rows"], how["seeds"]) == (pytest.approx(variance), 2, 2, 3)
    half = stats.t.ppf(0.975, 2) * np.sqrt(variance / 3)
    pooled = rows(board)["a"]["metrics"]["worst"]["pooled_interval"]
    assert (pooled["low"], pooled["high"]) == pytest.approx((0.57 - half, 0.57 + half), abs=1e-6)
    # With two groups Tukey's test is the t test.
    assert how["critical_difference"] == pytest.approx(stats.t.ppf(0.975, 2) * np.sqrt(2 * variance / 3), rel=1e-3)


def test_rows_stand_by_worst_group_then_by_label(make_record: MakeRecord) -> None:
    counts = {"b": one_task(90, 60), "a": one_task(80, 60), "c": one_task(70, 65)}
    board = build_board("b", [make_record(name, 0, count) for name, count in counts.items()])
    assert list(rows(board)) == ["c", "a", "b"]
    assert [row["metrics"]["worst"]["rank"] for row in rows(board).values()] == [1, 2, 2]


def test_costs_are_means_over_cells_and_null_where_one_is_unknown(make_record: MakeRecord) -> None:
    records = [make_record("er", seed, wall_seconds=10.0 * seed, peak_memory_mb=None if seed else 5.0) for seed in range(3)]
    cost = rows(build_board("b", records))["er"]["cost"]
    assert (cost["wall_seconds"], cost["peak_memory_mb"], cost["samples_seen"]) == (10.0, None, 1000)


def test_a_metric_that_means_nothing_for_a_row_is_null_there_and_ranked_among_the_others(make_record: MakeRecord) -> None:
    joint = [make_record("joint", seed, [[[(90, 100)], [(80, 100)]]], experiences=["joint"]) for seed in range(2)]
    others = [make_record(name, seed) for name in ("er", "sgd") for seed in range(2)]
    board = build_board("b", joint + others)
    forgetting = {name: row["metrics"]["forgetting"] for name, row in rows(board).items()}
    assert forgetting["joint"]["mean"] is None
    assert forgetting["joint"]["rank"] is None
    assert {forgetting["er"]["rank"], forgetting["sgd"]["rank"]} <= {1, 2}
    assert board["sections"][0]["ranking"]["forgetting"]["rows"] == 2


# Folds


def domains(make_record: MakeRecord, strategy: str, seed: int, correct: dict[str, int]) -> list[RunRecord]:
    facts = {"scenario": "leave-one-domain-out", "evaluate": "last", "stream": "digits-domains"}
    return [make_record(strategy, seed, one_task(c, c), fold=fold, **facts) for fold, c in correct.items()]


def test_worst_is_the_minimum_over_folds_of_leave_one_domain_out_and_average_the_mean(make_record: MakeRecord) -> None:
    row = rows(build_board("b", domains(make_record, "er", 0, {"ink": 90, "noise": 60, "blur": 75})))["er"]
    assert row["folds"] == ["blur", "ink", "noise"]
    assert row["metrics"]["worst"]["values"] == [pytest.approx(0.60)]
    assert row["metrics"]["average"]["values"] == [pytest.approx(0.75)]


def test_worst_is_the_mean_over_folds_elsewhere(make_record: MakeRecord) -> None:
    records = [make_record("er", 0, one_task(c), fold=fold, scenario="offline") for fold, c in (("a", 60), ("b", 90))]
    assert rows(build_board("b", records))["er"]["metrics"]["worst"]["values"] == [pytest.approx(0.75)]


def test_the_worst_fold_of_a_metric_that_should_be_low_is_the_highest(make_record: MakeRecord) -> None:
    error = MetricSpec("error", lambda scores: 1 - scores.groups[-1][0][0][0] / 100, False, "Share of errors.", "worst", True)
    records = domains(make_record, "er", 0, {"ink": 90, "noise": 60})
    assert rows(build_board("b", records, [error]))["er"]["metrics"]["error"]["mean"] == pytest.approx(0.4)


def test_an_incomplete_set_of_folds_is_flagged_and_not_ranked(make_record: MakeRecord) -> None:
    whole = domains(make_record, "er", 0, {"ink": 50, "noise": 50})
    board = build_board("b", whole + domains(make_record, "lws", 0, {"ink": 99}))
    row = rows(board)["lws"]
    assert (row["flags"], row["missing"], row["seeds"]) == (["incomplete"], [{"seed": 0, "fold": "noise"}], [])
    assert row["metrics"]["worst"]["rank"] is None
    assert rows(board)["er"]["metrics"]["worst"]["rank"] == 1


# What is not ranked


def test_an_incomplete_set_of_seeds_is_flagged_and_not_ranked(records: list[RunRecord]) -> None:
    board = build_board("b", [record for record in records if (record.label, record.identity["seed"]) != ("er", 2)])
    row = rows(board)["er"]
    assert (row["flags"], row["missing"], row["seeds"]) == (["incomplete"], [{"seed": 2, "fold": "all"}], [0, 1])
    assert (row["metrics"]["worst"]["rank"], row["metrics"]["worst"]["rank_range"]) == (None, None)
    assert board["sections"][0]["ranking"]["worst"]["rows"] == 2


def test_a_failed_cell_is_listed_with_its_reason_and_its_row_is_not_ranked(make_record: MakeRecord) -> None:
    board = build_board(
        "b", [make_record("er", 0), make_record("er", 1, failed=True), make_record("sgd", 0), make_record("sgd", 1)]
    )
    (failure,) = board["sections"][0]["failed"]
    assert (failure["label"], failure["seed"], failure["message"]) == ("er", 1, "loss is nan")
    assert rows(board)["er"]["flags"] == ["incomplete", "failed cells"]
    assert rows(board)["er"]["metrics"]["worst"]["rank"] is None


def test_a_strategy_that_only_failed_has_a_row_without_numbers_at_the_end(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("zero", 0, one_task(50, 0)), make_record("nan", 0, failed=True)])
    assert list(rows(board)) == ["zero", "nan"]
    assert rows(board)["nan"]["metrics"]["average"]["mean"] is None


@pytest.mark.parametrize(("share", "flags"), [(0.04, ["degenerate"]), (0.5, [])])
def test_a_spectral_merge_of_hardly_anything_is_flagged_but_ranked(
    make_record: MakeRecord, share: float, flags: list[str]
) -> None:
    made = [replace(make_record("tsv", seed), logs=[{"spectral_share": 0.9}, {"spectral_share": share}]) for seed in range(3)]
    row = rows(build_board("b", made))["tsv"]
    assert row["flags"] == flags
    assert row["metrics"]["worst"]["rank"] == 1


@pytest.mark.parametrize(
    ("fact", "flag"),
    [("uses_group_labels", "group labels"), ("uses_bias_knowledge", "bias knowledge"), ("uses_target", "upper bound")],
)
def test_knowledge_of_groups_or_of_the_bias_is_shown_but_changes_no_rank(
    make_record: MakeRecord, records: list[RunRecord], fact: str, flag: str
) -> None:
    alone = rows(build_board("b", records))
    together = rows(build_board("b", records + [make_record("gdro", seed, **{fact: True}) for seed in range(3)]))
    row = together.pop("gdro")
    assert row["flags"] == [flag]
    assert row["metrics"]["worst"]["rank"] is None
    assert row["metrics"]["worst"]["mean"] is not None
    assert together == alone


# Flags


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"git_commit": "1" * 40}, "mixed commits"),
        ({"packages": {"torch": "2.1"}}, "mixed packages"),
        ({"python": "3.12.0"}, "mixed packages"),
        ({"threads": 4}, "mixed threads"),
        ({"hardware": {"cpu": "another", "cores": 8, "gpu": None}}, "mixed hardware"),
        ({"device": "cuda"}, "mixed devices"),
        ({"base_weights_sha256": sha256("other weights")}, "mixed base weights"),
        ({"git_dirty": True}, "dirty tree"),
    ],
)
def test_a_mixture_within_a_row_is_flagged_but_ranked(make_record: MakeRecord, changes: dict[str, Any], flag: str) -> None:
    records = [make_record("er", 0), make_record("er", 1, **changes), make_record("sgd", 0), make_record("sgd", 1)]
    board = build_board("b", records)
    assert rows(board)["er"]["flags"] == [flag]
    assert rows(board)["sgd"]["flags"] == []
    assert rows(board)["er"]["metrics"]["worst"]["rank"] is not None
    assert board["sections"][0]["flags"] == [flag]


def test_what_a_failed_cell_ran_on_is_no_mixture(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("er", 0), make_record("er", 1, failed=True, threads=4)])
    assert rows(board)["er"]["flags"] == ["incomplete", "failed cells"]
    assert board["sections"][0]["flags"] == []


def test_a_mixture_between_rows_is_flagged_at_the_section(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("er"), make_record("sgd", threads=2)])
    assert board["sections"][0]["flags"] == ["mixed threads"]
    assert all(row["flags"] == [] for row in rows(board).values())


def test_commits_are_compared_within_a_distribution_since_each_has_its_own(make_record: MakeRecord) -> None:
    builtin, own = make_record("er"), make_record("mine", git_commit=None)
    own = replace(own, plugin={**own.plugin, "distribution": "my-package"})
    assert build_board("b", [builtin, own])["sections"][0]["flags"] == []
    other = make_record("sgd", git_commit="1" * 40)
    assert build_board("b", [builtin, own, other])["sections"][0]["flags"] == ["mixed commits"]


# Rows


def test_configs_of_one_strategy_are_rows_that_say_what_differs(make_record: MakeRecord) -> None:
    configs = ({"gamma": 0.3, "bins": 8}, {"gamma": 0.5, "bins": 8})
    board = build_board("b", [make_record("lws", seed, config=config) for config in configs for seed in range(2)])
    assert sorted(rows(board)) == ["lws gamma=0.3", "lws gamma=0.5"]
    assert all(row["seeds"] == [0, 1] for row in rows(board).values())


def test_two_versions_of_a_strategys_code_are_two_rows(make_record: MakeRecord) -> None:
    edited = make_record("lws", 0, code_sha256=sha256("edited"))
    board = build_board("b", [make_record("lws", 0), edited])
    assert sorted(rows(board)) == sorted(f"lws code={sha256(text)[:8]}" for text in ("lws", "edited"))


def test_merges_of_experts_by_two_versions_of_the_trainers_code_are_two_rows(make_record: MakeRecord) -> None:
    def merged(seed: int, trainer: str) -> RunRecord:
        record = make_record("ties", seed)
        identity = {**record.identity, "experts": {"strategy": "sgd", "code_sha256": sha256(trainer)}}
        return replace(record, identity=identity, run_id=sha256(identity))

    board = build_board("b", [merged(0, "old"), merged(1, "old"), merged(0, "new")])
    found = {name: (row["seeds"], row["flags"]) for name, row in rows(board).items()}
    old, new = (f"ties experts.code={sha256(text)[:8]}" for text in ("old", "new"))
    assert found == {old: ([0, 1], []), new: ([0], ["incomplete"])}


def test_hashes_are_shown_where_configs_alone_do_not_tell_rows_apart(make_record: MakeRecord) -> None:
    code = sha256("edited")
    changes: list[dict[str, Any]] = [{"config": {"g": 1}}, {"config": {"g": 2}}, {"config": {"g": 1}, "code_sha256": code}]
    variants = [row["variant"] for row in build_board("b", [make_record("lws", **c) for c in changes])["sections"][0]["rows"]]
    first = sha256("lws")[:8]
    assert sorted(variants) == sorted([f"code={first}, g=1", f"code={first}, g=2", f"code={code[:8]}, g=1"])


def test_a_cell_that_ran_on_two_devices_is_in_two_rows(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("lws", 0), make_record("lws", 0, device="cuda")])
    assert sorted(rows(board)) == ["lws device=cpu", "lws device=cuda"]


def test_a_preset_with_the_config_of_the_default_is_the_same_row(make_record: MakeRecord) -> None:
    board = build_board("b", [make_record("lws", 0, label="lws@paper"), make_record("lws", 1)])
    assert list(rows(board)) == ["lws"]


# Sections

OTHER_SECTION: list[dict[str, Any]] = [
    {"recipe": {"name": "quick", "epochs": 4}},
    {"recipe": {"name": "standard", "epochs": 4}, "custom": True},
    {"recipe": {"name": "standard", "epochs": 4}},
    {"tier": "full"},
    {"selection": "best epoch on validation data"},
    {"custom": True},
    {"evaluate": "last"},
    {"knobs": {"p_corr": 0.5}, "data_sha256": sha256("other data"), "custom": True},
    {"base": {"backbone": "vit", "kind": "random", "sha256": sha256("vit")}, "backbone": "vit", "base_sha256": sha256("vit")},
    {"protocol_version": 99},
    {"stream": "split-digits", "data_sha256": sha256("other data"), "split_sha256": sha256("other split")},
]


@pytest.mark.parametrize("changes", OTHER_SECTION, ids=lambda changes: "-".join(changes))
def test_rows_that_do_not_compare_stand_in_sections_of_their_own(make_record: MakeRecord, changes: dict[str, Any]) -> None:
    board = build_board(
        "b", [make_record("er"), make_record("sgd"), make_record("lws", **changes), make_record("lff", **changes)]
    )
    titles = [section["title"] for section in board["sections"]]
    assert len(set(titles)) == 2
    for section in board["sections"]:
        assert {row["metrics"]["worst"]["rank"] for row in section["rows"]} <= {1, 2}
    assert [("custom" in section["flags"]) for section in board["sections"]] == [False, changes.get("custom", False)]


def test_rows_that_were_carried_to_different_releases_do_not_compare(make_record: MakeRecord) -> None:
    def carried(strategy: str, kind: str) -> RunRecord:
        made = make_record(strategy)
        release = {"backbone": "small-conv", "kind": kind, "sha256": sha256(kind)}
        found = {**made.identity, "release": release}
        protocol = {**made.protocol, "release_sha256": release["sha256"], "release_weights_sha256": sha256("weights")}
        return replace(made, identity=found, run_id=sha256(found), protocol=protocol)

    board = build_board("b", [carried("er", "random"), carried("sgd", "random"), carried("lws", "supervised")])
    assert [[row["label"] for row in section["rows"]] for section in board["sections"]] in (
        [["er", "sgd"], ["lws"]],
        [["sgd", "er"], ["lws"]],
    )
    assert [section["release"]["kind"] for section in board["sections"]] == ["random", "supervised"]
    assert [
        section["title"].endswith(f"(release.kind={kind})")
        for section, kind in zip(board["sections"], ("random", "supervised"), strict=True)
    ] == [True, True]


def test_titles_name_what_tells_sections_apart(make_record: MakeRecord) -> None:
    custom = make_record("er", recipe={"name": "standard", "epochs": 4}, custom=True)
    titles = [section["title"] for section in build_board("b", [make_record("er"), custom])["sections"]]
    assert titles == [
        "b-digits 1, recipe standard (recipe.epochs=20)",
        "b-digits 1, recipe standard, custom (recipe.epochs=4)",
    ]


@pytest.mark.parametrize("name", ["split_sha256", "data_sha256", "stream_version"])
def test_standard_records_that_differ_in_version_split_or_data_are_refused(make_record: MakeRecord, name: str) -> None:
    value = "2" if name == "stream_version" else sha256("other")
    with pytest.raises(InputError, match=f"of stream 'b-digits' on a board, got {name} .* and .*; give each a board"):
        build_board("b", [make_record("er"), make_record("sgd", **{name: value})])


# Refusals


def test_a_board_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="expected at least one record"):
        build_board("b", [])


def test_two_different_records_of_one_run_are_refused(make_record: MakeRecord) -> None:
    record = make_record("er")
    with pytest.raises(InputError, match=f"expected one record of run {record.run_id}, got two that differ"):
        build_board("b", [record, replace(record, logs=[])])


def edit_seed(content: Any) -> None:
    content["identity"]["seed"] = 5


def edit_count(content: Any) -> None:
    content["results"]["counts"][-1][0][0][0] += 1


def edit_metric(content: Any) -> None:
    content["metrics"]["worst"]["value"] += 0.01


def edit_definition(content: Any) -> None:
    content["metrics"]["worst"]["definition"] = "Something kinder."


def edit_data_hash(content: Any) -> None:
    content["data"]["data_sha256"] = sha256("other")


def edit_code_hash(content: Any) -> None:
    content["plugin"]["code_sha256"] = sha256("other")


def edit_label(content: Any) -> None:
    content["label"] = "lws@released"


def edit_group_labels(content: Any) -> None:
    content["protocol"]["consumes"] = "GroupedExperience"


def edit_recipe(content: Any) -> None:
    content["protocol"]["recipe"] = "quick"


def edit_backbone(content: Any) -> None:
    content["protocol"]["backbone"] = "vit"


def edit_samples(content: Any) -> None:
    content["data"]["counts"]["eval"]["all/task-0"] = 100


EDITS: dict[Callable[[Any], None], str] = {
    edit_seed: 'expected run_id "[0-9a-f]{64}", got',
    edit_count: 'expected results_sha256 "[0-9a-f]{64}", got',
    edit_metric: "metric 'worst': expected 0.[0-9]+ from the counts, got",
    edit_definition: "metric 'worst': expected the definition 'Mean over",
    edit_data_hash: "expected data.data_sha256",
    edit_code_hash: "expected plugin.code_sha256",
    edit_label: 'expected label "(er|sgd)@released", got "lws@released"',
    edit_group_labels: "expected protocol.uses_group_labels true, got false",
    edit_recipe: 'expected protocol.recipe "standard", got "quick"',
    edit_backbone: 'expected protocol.backbone "small-conv", got "vit"',
    edit_samples: "expected results.counts in row 0 over data.counts.eval of 'all/task-0', 100 samples, got 200",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_board_of_an_edited_record_is_refused(make_record: MakeRecord, edit: Callable[[Any], None]) -> None:
    content = json.loads(make_record("er").to_json())
    edit(content)
    with pytest.raises(InputError, match=f"^record [0-9a-f]{{12}}: {EDITS[edit]}"):
        build_board("b", [RunRecord(**content)])


def without_first_eval_set(results: Any) -> None:
    for row in (results["eval_sets"], *results["counts"], *results["class_counts"]):
        del row[0]


def with_half_the_samples(results: Any) -> None:
    results["counts"][1][0] = [[25, 50], [25, 50]]
    results["class_counts"][1][0] = [[25, 50], [25, 50]]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda results: results["counts"].pop(), "expected counts after each of 2 experiences, got 1"),
        (lambda results: results["counts"][0].pop(), "expected counts for 2 eval sets in every row"),
        (lambda results: results["counts"][0][0].pop(), "expected 2 groups, got 1"),
        (lambda results: results["counts"][0][0].__setitem__(0, [101, 100]), "at most as many correct as in total"),
        (lambda results: results["class_counts"][0][0][0].__setitem__(0, 0), "groups and classes to sum to one"),
        (lambda results: results["eval_sets"][0].__setitem__("name", "task-1"), "expected 2 eval sets of different names"),
        (without_first_eval_set, "in row 0 over data.counts.eval of 'all/task-0', 200 samples, got none"),
        (with_half_the_samples, "in row 1 over data.counts.eval of 'all/task-0', 200 samples, got 100"),
    ],
)
def test_counts_that_contradict_each_other_are_refused_though_their_hash_is_right(
    make_record: MakeRecord, edit: Callable[[Any], None], problem: str
) -> None:
    content = json.loads(make_record("er").to_json())
    edit(content["results"])
    content["results_sha256"] = sha256(content["results"])
    with pytest.raises(InputError, match=problem):
        build_board("b", [RunRecord(**content)])


# Check


def test_check_finds_nothing_wrong_with_a_board_and_its_records(records: list[RunRecord]) -> None:
    board = json.loads(board_json(build_board("b", records)))
    assert check_board(board, records) == []
    assert check_board(board, texts(records)) == []


def changed_digits(text: str, count: int) -> list[str]:
    """The text with one digit replaced, at random places."""
    rng = random.Random(0)
    places = rng.sample([place for place, character in enumerate(text) if character.isdigit()], count)
    return [text[:place] + str((int(text[place]) + rng.randint(1, 9)) % 10) + text[place + 1 :] for place in places]


def problems_of(board_text: str, record_texts: dict[str, str]) -> list[str]:
    try:
        return check_board(json.loads(board_text), record_texts)
    except json.JSONDecodeError as error:  # a leading zero
        return [str(error)]


def test_check_finds_a_single_changed_digit_anywhere_in_the_board(make_record: MakeRecord) -> None:
    records = [make_record(name, seed) for name in ("er", "sgd") for seed in range(3)]
    text, files = board_json(build_board("b", records)), texts(records)
    assert problems_of(text, files) == []
    assert [changed for changed in changed_digits(text, 60) if not problems_of(changed, files)] == []


def test_check_finds_a_single_changed_digit_anywhere_in_a_record(make_record: MakeRecord) -> None:
    records = [make_record("er"), make_record("sgd")]
    board, files = build_board("b", records), texts(records)
    victim = records[0].run_id
    missed = [text for text in changed_digits(files[victim], 60) if not check_board(board, files | {victim: text})]
    assert missed == []


def forge(board: Board, record: RunRecord, content: Any) -> tuple[Board, str]:
    """A record's new text, and the board with its hash, as a careful forger would write them."""
    text = RunRecord(**content).to_json()
    forged = copy.deepcopy(board)
    forged["records"][record.run_id] = hashlib.sha256(text.encode()).hexdigest()
    forged.pop("sha256")
    return forged | {"sha256": sha256(forged)}, text


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_check_finds_an_edited_record_though_the_board_holds_its_new_hash(
    records: list[RunRecord], edit: Callable[[Any], None]
) -> None:
    content = json.loads(records[0].to_json())
    edit(content)
    board, text = forge(build_board("b", records), records[0], content)
    assert re.search(EDITS[edit], check_board(board, texts(records) | {records[0].run_id: text})[0])


def test_check_finds_a_number_of_the_board_though_the_boards_hash_was_made_anew(records: list[RunRecord]) -> None:
    board = build_board("b", records)
    board["sections"][0]["rows"][1]["metrics"]["worst"]["mean"] += 0.001
    board.pop("sha256")
    board["sha256"] = sha256(board)
    problems = check_board(board, records)
    assert problems[0].startswith("board at $.sections[0].rows[1].metrics.worst.mean: expected 0.")


def test_check_finds_a_row_that_was_added_and_one_that_was_taken_away(records: list[RunRecord]) -> None:
    rows = build_board("b", records)["sections"][0]["rows"]
    for changed in (rows + rows[:1], rows[1:]):
        board = build_board("b", records)
        board["sections"][0]["rows"] = changed
        assert any("$.sections[0].rows: expected 3 items" in problem for problem in check_board(board, records))


def test_check_finds_a_missing_and_an_additional_record(make_record: MakeRecord, records: list[RunRecord]) -> None:
    board = build_board("b", records)
    first, other = records[0].run_id[:12], make_record("er", 9)
    (problem,) = check_board(board, records[1:])
    assert problem == f"expected the 9 records of the board, got 8 of them; restore record {first}"
    (problem,) = check_board(board, [*records, other])
    advice = f"build the board again or take away record {other.run_id[:12]}"
    assert problem == f"expected the 9 records of the board, got 9 of them and 1 other; {advice}"


def test_check_finds_a_truncated_record_and_one_of_a_newer_schema(records: list[RunRecord]) -> None:
    board, files, victim = build_board("b", records), texts(records), records[0]
    (cut,) = check_board(board, files | {victim.run_id: files[victim.run_id][:-40]})
    assert "expected a complete JSON file" in cut
    (newer,) = check_board(board, files | {victim.run_id: replace(victim, schema_version="2.0.0").to_json()})
    assert "expected schema 1.0.0, got 2.0.0; update shiftproof" in newer


def test_check_finds_a_file_with_another_runs_record(records: list[RunRecord]) -> None:
    files = texts(records)
    files[records[0].run_id] = files[records[1].run_id]
    (problem,) = check_board(build_board("b", records), files)
    assert "expected a file named by its run id" in problem


def test_check_says_what_is_wrong_with_the_shape_of_a_board(records: list[RunRecord]) -> None:
    board = build_board("b", records) | {"surprise": 1}
    (problem,) = check_board(board, records)
    assert "'surprise' was unexpected" in problem


def test_a_plugins_metric_is_a_column_and_check_needs_the_plugin(make_record: MakeRecord) -> None:
    best = MetricSpec("best", lambda scores: max(c / n for c, n in scores.groups[-1][0]), True, "Best group.", primary=True)
    metrics = [*shiftproof_metrics(), best]
    records = [make_record("er", seed) for seed in range(2)]
    board = build_board("b", records, metrics)
    assert rows(board)["er"]["metrics"]["best"]["rank"] == 1
    assert check_board(board, records, metrics) == []
    (problem,) = check_board(board, records)
    assert "expected metric 'best' of the board to be installed" in problem


# Files


@pytest.fixture
def board_file(records: list[RunRecord], tmp_path: Path) -> Path:
    path = tmp_path / "digits.json"
    path.write_text(board_json(build_board("digits", records)))
    return path


def test_a_board_is_read_back_as_it_was_built(board_file: Path, records: list[RunRecord]) -> None:
    assert board_json(read_board(board_file)) == board_json(build_board("digits", records))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "digits.json: expected a complete JSON file"),
        (
            lambda text: text.replace('"seed', '"sead', 1),
            "expected what leaderboards/schema.json describes",
        ),
        (
            lambda text: text.replace('"name": "digits"', '"name": "digit5"'),
            "expected a board as it was built, got",
        ),
        (lambda text: text.replace('"schema_version": "1.', '"schema_version": "2.'), "expected schema 1.0.0, got 2.0.0"),
        (lambda text: text.replace('"kind": "board"', '"kind": "bored"'), "expected a board, got kind 'bored'"),
        (lambda text: "[]", "expected a JSON object, got list"),
        (lambda text: "[" * 100_000, "expected a JSON file, got one that is nested too deeply"),
        (lambda text: text.replace('"mean": ', '"mean": 0.999999,\n"mean": ', 1), "one that holds the key 'mean' twice"),
    ],
)
def test_a_damaged_board_is_refused_in_one_line(board_file: Path, damage: Callable[[str], str], message: str) -> None:
    text = board_file.read_text()
    board_file.write_text(damage(text))
    assert board_file.read_text() != text
    with pytest.raises(InputError, match=message) as caught:
        read_board(board_file)
    assert str(caught.value).startswith(f"{board_file}: expected ")
    assert "\n" not in str(caught.value)


def test_a_board_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a JSON file that can be read, got: No such file"):
        read_board(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="bytes that are not UTF-8"):
        read_board(tmp_path / "bytes.json")


def test_record_texts_reads_the_files_of_a_store(records: list[RunRecord], tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for record in records:
        store.write(record)
    assert record_texts(store.folder) == record_texts(tmp_path) == texts(records)
    with pytest.raises(InputError, match="expected a folder with the board's records"):
        record_texts(tmp_path / "none")


# Schema


def test_a_violation_is_named_by_its_json_path(make_record: MakeRecord) -> None:
    content = json.loads(make_record("er").to_json())
    content["cost"]["wall_seconds"] = "long"
    with pytest.raises(InputError, match=r"document: .* got at \$\.cost\.wall_seconds: 'long' is not of type"):
        validate(content)


@pytest.mark.parametrize(
    "label", ["\x1b[31mer", "er\n", "er |", "<script>", "=HYPERLINK(1)", "caf\udce9", "er@", "er@a@b", "Er", "er gamma=1", ""]
)
def test_a_label_that_no_strategy_and_preset_can_have_is_refused(make_record: MakeRecord, label: str) -> None:
    with pytest.raises(InputError, match=r"got at \$\.label") as caught:
        build_board("b", [replace(make_record("er"), label=label)])
    assert str(caught.value).isprintable()


def test_labels_in_the_schema_are_the_names_that_can_be_registered() -> None:
    assert schema()["$defs"]["label"]["pattern"] == rf"^{NAME.pattern}(@{NAME.pattern})?(?![\s\S])"


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [("cost", "wall_seconds", 1e308), ("provenance", "attempts", 1.0), ("identity", "seed", 0.0), ("identity", "seed", True)],
)
def test_numbers_out_of_bounds_and_floats_for_integers_are_refused(
    make_record: MakeRecord, block: str, name: str, value: object
) -> None:
    content = json.loads(make_record("er").to_json())
    content[block][name] = value
    with pytest.raises(InputError, match=re.escape(f"got at $.{block}.{name}: {value} is ")):
        validate(content)


@pytest.mark.parametrize("version", ["2.0.0", "1.9.0"])
def test_documents_of_a_newer_schema_are_refused(make_record: MakeRecord, version: str) -> None:
    with pytest.raises(InputError, match=f"expected schema 1.0.0, got {version}; update shiftproof"):
        validate(vars(replace(make_record("er"), schema_version=version)))


@pytest.mark.parametrize(
    "command",
    [
        "/usr/bin/shiftproof run quick",
        "shiftproof run quick --out /data/me/runs",
        "shiftproof run quick --out=/data",
        "shiftproof run '/a b/c.toml'",
        "shiftproof run ~/suite.toml",
        "shiftproof run ~me/suite.toml",
        r"shiftproof run C:\suites\mine.toml",
        r"shiftproof run \\server\share",
    ],
)
def test_a_record_with_an_absolute_path_in_its_command_is_refused(make_record: MakeRecord, command: str) -> None:
    with pytest.raises(InputError, match=r"got at \$\.provenance\.command"):
        validate(vars(make_record("er", command=command)))


@pytest.mark.parametrize(
    "command", ["shiftproof run suites/mine.toml --out ../runs", "shiftproof run a --set er.note=https://example.org/x and/or"]
)
def test_relative_paths_and_addresses_may_stand_in_a_command(make_record: MakeRecord, command: str) -> None:
    record = make_record("er", command=command)
    assert check_board(build_board("b", [record]), [record]) == []


def test_a_finished_record_needs_results_and_a_failed_one_a_reason(make_record: MakeRecord) -> None:
    with pytest.raises(InputError, match=r"\$\.results"):
        validate(vars(replace(make_record("er"), results=None)))
    with pytest.raises(InputError, match=r"\$\.error"):
        validate(vars(replace(make_record("er", failed=True), error=None)))
