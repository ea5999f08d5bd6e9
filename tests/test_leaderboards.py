"""The boards in this repository: each is checked against its records, as a stranger would."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from shiftproof.benchmark.boards.leaderboard import check_board, read_board, record_texts
from shiftproof.benchmark.boards.verification import schema

FOLDER = Path(__file__).parent.parent / "leaderboards"


def test_the_schema_is_a_valid_draft_2020_12_schema() -> None:
    content = schema()
    assert content["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert Draft202012Validator(Draft202012Validator.META_SCHEMA).is_valid(content)


def test_every_reference_in_the_schema_leads_to_a_definition_and_every_definition_is_used() -> None:
    text = (FOLDER / "schema.json").read_text()
    names = set(schema()["$defs"])
    used = {part.split('"')[0] for part in text.split('"$ref": "#/$defs/')[1:]}
    assert used == names


def test_every_board_agrees_with_its_records() -> None:
    problems = {}
    for path in sorted(FOLDER.glob("*.json")):
        if path.name == "schema.json":
            continue
        board = read_board(path)
        found = check_board(board, record_texts(FOLDER / "runs" / path.stem / "records"))
        if board["name"] != path.stem:
            found.append(f"expected the board to be named {path.stem}, got {board['name']}")
        problems[path.name] = found
    assert {name: found for name, found in problems.items() if found} == {}


def test_numbers_printed_in_the_thesis_add_up_to_its_averages_and_lie_above_its_worst_groups() -> None:
    """The last rows of tables 4.1 and 4.2, cut to two digits there; tables 5.1 and 5.2 print none."""
    columns = ("ERM", "George", "BPA", "ClusterFix", "GDRO")
    printed = {"4.1": (72.29, 78.07, 83.17, 83.91, 82.31), "4.2": (41.11, 59.09, 73.11, 76.80, 71.67)}
    tables = {
        table["table"]: table["rows"] for table in json.loads((FOLDER / "published" / "thesis.json").read_text())["tables"]
    }
    for name, averages in printed.items():
        found = [fmean(row[column]["mean"] for row in tables[name].values()) for column in columns]
        assert found == pytest.approx(averages, abs=0.01)
    for average, worst in (("4.1", "4.2"), ("5.1", "5.2")):
        assert tables[average].keys() == tables[worst].keys()
        for row, other in zip(tables[average].values(), tables[worst].values(), strict=True):
            assert all(row[column]["mean"] >= other[column]["mean"] for column in row)
