"""Is a record or board what it says? Its shape by the JSON Schema; its hashes and numbers by computing them again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import ValidationError  # type: ignore[import-untyped]
from jsonschema.validators import extend  # type: ignore[import-untyped]

from shiftproof.benchmark.contracts import MetricSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.metrics import CellScores
from shiftproof.benchmark.records import RunRecord, canonical, check_version, sha256

if TYPE_CHECKING:
    from shiftproof.benchmark.streams import Scenario

MESSAGE_LENGTH = 160  # of what the schema says, or of a value; a message holds the whole instance otherwise


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of run records and boards, as it ships with the package."""
    # Read as data: the harness imports no other layer.
    text = files("shiftproof.leaderboards").joinpath("schema.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


@lru_cache(maxsize=1)
def _validator() -> Any:
    # JSON Schema takes 1.0 for an integer; what counts samples here is written as one.
    checker = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return extend(Draft202012Validator, type_checker=checker)(schema())


def validate(document: Mapping[str, Any], where: str = "document") -> None:
    """Compare a run record or a board with the JSON Schema.

    Args:
        document: What a JSON file holds.
        where: Names the document in the error, a file name for example.

    Raises:
        InputError: With the JSON path of the first violation, or if a newer shiftproof wrote the document.
    """
    check_version(document, where)
    violations: list[ValidationError] = sorted(
        _validator().iter_errors(document), key=lambda violation: str(violation.json_path)
    )
    if violations:
        message = " ".join(str(violations[0].message).split())
        short = (
            message
            if len(message) <= MESSAGE_LENGTH
            else f"{message[: MESSAGE_LENGTH // 2]} ... {message[-MESSAGE_LENGTH // 2 :]}"
        )
        raise InputError(
            f"{where}: expected what leaderboards/schema.json describes, got at {violations[0].json_path}: {short}; "
            "restore the file or write it again"
        )


def scenario_of(record: RunRecord) -> Scenario:
    """The scenario of a record's stream."""
    # Here, as it brings torch with it, which showing a board does not need.
    from shiftproof.benchmark.streams import Scenario

    return Scenario(record.protocol["scenario"])


def scores_of(record: RunRecord) -> CellScores:
    """The counts of a finished record."""
    assert record.results is not None, "a failed record has no counts"
    return CellScores.from_results(record.results, scenario_of(record).ordered)


def cell_metrics(record: RunRecord, metrics: Sequence[MetricSpec]) -> dict[str, float | None]:
    """Every metric of a finished record, computed from its counts."""
    scores = scores_of(record)
    return {metric.name: metric.compute(scores) for metric in metrics}


def name_of(run_id: str, folder: Path | None) -> str:
    """What problems call a record: its file if it was read from a folder, else the start of its run id."""
    return f"record {run_id[:12]}" if folder is None else str(folder / f"{run_id}.json")


def record_problems(record: RunRecord, metrics: Sequence[MetricSpec], folder: Path | None = None) -> list[str]:
    """What is wrong with a record, one line each; empty if its shape, its hashes and its metrics are right.

    Args:
        record: Finished or failed.
        metrics: What the record's metrics are compared with; those it names beyond these are left alone.
        folder: That holds the record's file, if it has one.
    """
    where = name_of(record.run_id, folder)
    try:
        validate(vars(record), where)
    except InputError as error:
        return [str(error)]
    found = [*_contradictions(record), *_count_problems(record)]
    return [f"{where}: {problem}" for problem in (found or _metric_problems(record, metrics))]


def _contradictions(record: RunRecord) -> Iterator[str]:
    """Facts that stand twice in a record, and hashes."""
    identity, protocol = record.identity, record.protocol
    preset = "".join(record.label.partition("@")[1:])
    grouped = protocol["consumes"] == "GroupedExperience"
    pairs = {
        "run_id": (sha256(identity), record.run_id),
        "label": (identity["strategy"] + preset, record.label),
        "protocol.recipe": (identity["recipe"]["name"], protocol["recipe"]),
        "protocol.backbone": (identity["base"]["backbone"], protocol["backbone"]),
        "protocol.uses_group_labels": (grouped or protocol["uses_group_labels"], protocol["uses_group_labels"]),
        "data.data_sha256": (identity["data_sha256"], record.data["data_sha256"]),
        "data.split_sha256": (identity["split_sha256"], record.data["split_sha256"]),
        "plugin.code_sha256": (identity["code_sha256"], record.plugin["code_sha256"]),
        "protocol.base_sha256": (identity["base"]["sha256"], protocol["base_sha256"]),
        "protocol.release_sha256": (identity.get("release", {}).get("sha256"), protocol.get("release_sha256")),
        "results_sha256": (record.results and sha256(record.results), record.results_sha256),
    }
    for name, (expected, got) in pairs.items():
        if expected != got:
            shown = [canonical(value)[:MESSAGE_LENGTH] for value in (expected, got)]
            yield f"expected {name} {shown[0]}, got {shown[1]}; the file was edited: restore it or run the cell again"


def _count_problems(record: RunRecord) -> Iterator[str]:
    if record.results is None:
        return
    rows, eval_sets = len(record.results["experiences"]), record.results["eval_sets"]
    groups, classes = record.results["counts"], record.results["class_counts"]
    if not len(groups) == len(classes) == rows:
        yield f"expected counts after each of {rows} experiences, got {len(groups)} (groups) and {len(classes)} (classes)"
    elif any(len(row) != len(eval_sets) for row in (*groups, *classes)):
        yield f"expected counts for {len(eval_sets)} eval sets in every row"
    elif len({eval_set["name"] for eval_set in eval_sets}) < len(eval_sets):
        yield f"expected {len(eval_sets)} eval sets of different names"
    else:
        for i, (group_row, class_row) in enumerate(zip(groups, classes, strict=True)):
            for eval_set, by_group, by_class in zip(eval_sets, group_row, class_row, strict=True):
                yield from (
                    f"counts of eval set {eval_set['name']!r} in row {i}: {problem}"
                    for problem in _cell_problems(eval_set["groups"], by_group, by_class)
                )
            yield from _total_problems(record, i)


def _cell_problems(names: list[str], by_group: list[list[int]], by_class: list[list[int]]) -> Iterator[str]:
    if len(by_group) != len(names):
        yield f"expected {len(names)} groups, got {len(by_group)}"
    if any(correct > total for correct, total in (*by_group, *by_class)):
        yield "expected at most as many correct as in total"
    sums = [tuple(map(sum, zip(*counts, strict=True))) for counts in (by_group, by_class)]
    if sums[0] != sums[1] or sums[0][1] == 0:
        yield f"expected groups and classes to sum to one (correct, total), the total above 0, got {sums[0]} and {sums[1]}"


def _total_problems(record: RunRecord, row: int) -> Iterator[str]:
    """A row of counts is over every sample of every eval set of the fold."""
    assert record.results is not None, "a failed record has no counts"
    prefix, cells = f"{record.identity['fold']}/", record.results["counts"][row]
    stated = {name: total for name, total in record.data["counts"]["eval"].items() if name.startswith(prefix)}
    sums = [sum(total for _, total in cell) for cell in cells]
    counted = {prefix + eval_set["name"]: n for eval_set, n in zip(record.results["eval_sets"], sums, strict=True)}
    for name in sorted(stated.keys() | counted.keys()):
        expected, got = (totals.get(name, "none") for totals in (stated, counted))
        if expected != got:
            yield f"expected results.counts in row {row} over data.counts.eval of {name!r}, {expected} samples, got {got}"


def _metric_problems(record: RunRecord, metrics: Sequence[MetricSpec]) -> Iterator[str]:
    if record.results is None:
        if record.metrics:
            yield "expected no metrics in the record of a failed cell"
        return
    known = {metric.name: metric for metric in metrics}
    computed = cell_metrics(record, [known[name] for name in record.metrics if name in known])
    for name, value in computed.items():
        stated, metric = record.metrics[name], known[name]
        if not _equal(value, stated["value"]):
            yield f"metric {name!r}: expected {value} from the counts, got {stated['value']}"
        if (stated["higher_is_better"], stated["definition"]) != (metric.higher_is_better, metric.definition):
            yield f"metric {name!r}: expected the definition {metric.definition!r}, got {stated['definition']!r}"


def _equal(computed: float | None, stated: float | None) -> bool:
    if computed is None or stated is None:
        return computed is stated
    # A metric may sum in another order on another machine; single digits are the business of the file's hash.
    return math.isclose(computed, stated, rel_tol=1e-9, abs_tol=1e-12)
