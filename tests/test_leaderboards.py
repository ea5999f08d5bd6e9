"""The boards in this repository: each is checked against its records, as a stranger would."""

from pathlib import Path

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
