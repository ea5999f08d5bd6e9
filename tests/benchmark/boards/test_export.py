"""Exports of a board. Oracles: the csv module, rich's own measurement, and text written by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from shiftproof.benchmark.boards.export import render, table
from shiftproof.benchmark.boards.leaderboard import board_json, build_board
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import RunRecord

MakeRecord = Callable[..., RunRecord]


def two_groups(good: int, bad: int) -> list[Any]:
    return [[[(good, 100), (bad, 100)]]]


@pytest.fixture
def board(make_record: MakeRecord) -> dict[str, Any]:
    offline = {"scenario": "offline"}
    records = [make_record("er", seed, two_groups(90 + seed, 60 + seed), **offline) for seed in range(3)]
    records += [make_record("lws", seed, two_groups(90 + seed, 80 + seed), config={"g": 1}, **offline) for seed in range(3)]
    records += [make_record("lws", seed, two_groups(85 + seed, 30 + seed), config={"g": 2}, **offline) for seed in range(3)]
    records += [make_record("gdro", seed, two_groups(95, 94), uses_group_labels=True, **offline) for seed in range(3)]
    records += [make_record("nan", seed, failed=seed == 1, **offline, threads=2) for seed in range(2)]
    return build_board("demo", records)


def printed(board: dict[str, Any], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    for one in table(board):
        console.print(one)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def test_markdown_shows_percent_rank_range_and_flags_in_the_order_of_worst_group(board: dict[str, Any]) -> None:
    lines = render(board, "markdown").splitlines()
    start = lines.index("## b-digits 1, recipe standard")
    assert lines[start + 2 : start + 8] == [
        "| strategy | average ↑ | worst ↑ | rank | flags |",
        "| --- | ---: | ---: | ---: | --- |",
        "| gdro | 94.5 ± 0.0 | 94.0 ± 0.0 | – | group labels |",
        r"| lws \[g=1] | 86.0 ± 1.0 | 81.0 ± 1.0 | 1 (1–1) |  |",
        "| er | 76.0 ± 1.0 | 61.0 ± 1.0 | 2 (2–2) |  |",
        r"| lws \[g=2] | 58.5 ± 1.0 | 31.0 ± 1.0 | 3 (3–3) |  |",
    ]
    assert "All rows together: mixed threads. Failed: nan, seed 1: loss is nan." in lines[-1]


def test_one_seed_shows_neither_std_nor_a_rank_range(make_record: MakeRecord) -> None:
    text = render(build_board("one", [make_record("er", counts=two_groups(90, 60), scenario="offline")]), "markdown")
    assert "| er | 75.0 | 60.0 | 1 |  |" in text
    assert text.endswith("Percent, mean over 1 seed.\n")


def test_a_column_is_shown_where_a_row_has_a_value_and_in_csv_always(make_record: MakeRecord) -> None:
    offline = make_record("er", counts=two_groups(90, 60), scenario="offline", stream="a")
    failed = [make_record("nan", stream=stream, failed=True) for stream in ("c", "sequence")]
    board = build_board("many", [offline, make_record("er", stream="sequence"), *failed])
    headers = [line for line in render(board, "markdown").splitlines() if line.startswith("| strategy")]
    shown = [line[len("| strategy | ") : -len(" | rank | flags |")] for line in headers]
    assert shown == ["average ↑ | worst ↑", *["average ↑ | worst ↑ | forgetting ↓"] * 2]  # all rows of the second failed
    assert [len(one.columns) for one in table(board)] == [5, 6, 6]
    assert "forgetting_mean" in render(board, "csv").splitlines()[0]


def test_csv_holds_every_number_as_stored(board: dict[str, Any]) -> None:
    lines = {(row["strategy"], row["variant"]): row for row in csv.DictReader(io.StringIO(render(board, "csv")))}
    assert len(lines) == 5
    for row in board["sections"][0]["rows"]:
        line = lines[row["label"], row["variant"]]
        for name, summary in row["metrics"].items():
            own, pooled = summary["interval"] or {}, summary["pooled_interval"] or {}
            low, high = summary["rank_range"] or (None, None)
            expected = {key: summary[key] for key in ("mean", "std", "rank")} | {"rank_low": low, "rank_high": high}
            expected |= {"low": own.get("low"), "high": own.get("high")}
            expected |= {"pooled_low": pooled.get("low"), "pooled_high": pooled.get("high")}
            assert {key: float(text) if (text := line[f"{name}_{key}"]) else None for key in expected} == expected
    assert lines["nan", ""]["flags"] == "incomplete; failed cells"
    assert float(lines["er", ""]["wall_seconds"]) == 60.0


def test_latex_escapes_what_latex_would_read_as_commands(board: dict[str, Any]) -> None:
    board["sections"][0]["rows"][0]["variant"] = "a|b_&"
    text = render(board, "latex")
    assert r"gdro [a|b\_\&] & 94.5 $\pm$ 0.0 & 94.0 $\pm$ 0.0 & -- & group labels \\" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    assert r"95 \% for all rows" in text
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    assert {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")} == {4}


def test_tables_fit_into_100_columns_with_long_names_and_all_flags(make_record: MakeRecord) -> None:
    facts: dict[str, Any] = {"uses_group_labels": True, "uses_bias_knowledge": True, "git_dirty": True}
    facts |= {"strategy": "clusterfix-replay", "label": "clusterfix-replay@released"}
    records = [make_record(seed=0, **facts), make_record(seed=1, threads=2, **facts), make_record("er", 3)]
    lines = printed(build_board("wide", records), 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("clusterfix-replay@released" in line and "±" in line for line in lines)


def test_tables_show_brackets_of_labels_and_not_take_them_for_markup(board: dict[str, Any]) -> None:
    text = printed(board, 100)
    assert "lws [g=1]" in text
    assert "61.0 ± 1.0" in text


INJECTED = "\x1b[2J\n# h | <script> ![x](y) \\ \u202e"


@pytest.fixture
def injected(make_record: MakeRecord) -> dict[str, Any]:
    """A board with such a text wherever a record may hold a free one."""
    config, recipe = {"note": INJECTED}, {"name": INJECTED}
    records = [make_record("er", config=config, recipe=recipe), make_record("er", recipe=recipe)]
    failed = make_record("nan", failed=True, recipe=recipe)
    assert failed.error is not None
    return build_board(INJECTED, [*records, replace(failed, error=failed.error | {"message": INJECTED})])


@pytest.mark.parametrize("format", ["csv", "markdown", "latex", "table"])
def test_no_export_holds_a_character_that_a_terminal_obeys(injected: dict[str, Any], format: str) -> None:
    text = printed(injected, 200) if format == "table" else render(injected, format)
    assert [line for line in text.splitlines() if not line.isprintable()] == []
    assert "h | <script>" in text.replace("\\", "") or format == "table"


def test_markdown_shows_free_text_as_text(injected: dict[str, Any]) -> None:
    text = render(injected, "markdown")
    assert text.count(r" \[2J # h \| \<script> !\[x](y) \\ ") == 4  # name, title, variant and reason
    assert sum(line.startswith("#") for line in text.splitlines()) == 2
    assert "<script>" not in text.replace(r"\<", "")


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)"])
def test_csv_holds_no_text_that_a_spreadsheet_would_compute(board: dict[str, Any], text: str) -> None:
    board["sections"][0]["rows"][0]["variant"] = text
    board["sections"][0]["rows"][0]["metrics"]["worst"]["mean"] = -0.5
    line = next(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert (line["variant"], line["worst_mean"]) == (f"'{text}", "-0.5")


def test_every_section_has_a_table_with_its_title(make_record: MakeRecord) -> None:
    quick = make_record("er", recipe={"name": "quick", "epochs": 4})
    titles = [one.title for one in table(build_board("two", [make_record("er"), quick]))]
    assert titles == [
        "b-digits 1, recipe quick (recipe.epochs=4)",
        "b-digits 1, recipe standard (recipe.epochs=20)",
    ]


@pytest.mark.parametrize("format", ["csv", "markdown", "latex"])
def test_a_board_read_from_its_file_renders_as_the_one_that_was_built(board: dict[str, Any], format: str) -> None:
    assert render(json.loads(board_json(board)), format) == render(board, format)


def test_an_unknown_format_is_refused(board: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected a format out of csv, markdown, latex, got 'html'"):
        render(board, "html")
