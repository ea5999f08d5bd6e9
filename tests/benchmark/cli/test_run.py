"""`shiftproof run`, `check` and `leaderboard` on a planted stream that takes a second."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shiftproof.benchmark.cli.main import app
from shiftproof.benchmark.cli.run import names_of, parse_seeds, registry_for
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import RecordStore, read_record, sha256
from shiftproof.benchmark.registry.catalogue import read_catalogue

SHORT = ("--set", "recipe.epochs=1", "--executor", "inline", "--device", "cpu")

LOOSE = """
from dataclasses import dataclass
from shiftproof.benchmark import DataExperience, StrategySpec, SuiteSpec, hookimpl
from shiftproof.strategies import TrainingStrategy
from torch.nn import functional as F

@dataclass(frozen=True)
class LooseConfig:
    pass

class Loose(TrainingStrategy[LooseConfig]):
    def loss(self, batch):
        return F.cross_entropy(self.logits(batch), batch.y)

@hookimpl
def shiftproof_strategies():
    return [StrategySpec("loose", Loose, LooseConfig, DataExperience, "Me, 2026")]

@hookimpl
def shiftproof_suites():
    return [SuiteSpec("loose-suite", "a suite", ("toy-stream",), ("loose", "toy"), (0,))]
"""


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The one line on standard error of a call that ends with 2 and prints nothing else."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    return str(line)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((out / "records").glob("*.json"))]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_dry_run_prints_the_cells_and_what_is_skipped_and_starts_nothing(toy: Path, out: Path) -> None:
    options = ("--stream", "toy-stream", "--strategy", "toy@released,absent", "--seeds", "0,4", "--dry-run", "--out", str(out))
    lines = call("run", *options).stdout.splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["toy@released", "toy-stream", "all", "0", "to", "run"],
        ["toy@released", "toy-stream", "all", "4", "to", "run"],
    ]
    assert lines[4].endswith("skipped: needs shiftproof[clip]")
    assert not out.exists()


def test_a_run_writes_records_board_and_pictures_and_says_where(toy: Path, out: Path) -> None:
    result = call("run", "toy", *SHORT, "--seeds", "0", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert sorted(record["label"] for record in records(out)) == ["toy", "toy@released"]
    assert f"board: {out / 'board.json'}" in result.stdout
    pictures = [line.removeprefix("picture: ") for line in result.stdout.splitlines() if line.startswith("picture: ")]
    assert pictures
    assert all(Path(picture).is_file() for picture in pictures)
    assert "2 cells run, 0 kept, 0 failed, 0 lost" in result.stdout
    assert call("leaderboard", "check", str(out / "board.json")).exit_code == 0


def test_the_same_command_keeps_what_is_finished_and_rerun_does_not(toy: Path, out: Path) -> None:
    command = ("run", "short", "--executor", "inline", "--device", "cpu", "--out", str(out))
    call(*command)
    assert "0 cells run, 1 kept" in call(*command).stdout
    assert call(*command, "--dry-run").stdout.splitlines()[2].endswith("finished")
    assert call(*command, "--dry-run", "--rerun").stdout.splitlines()[2].endswith("to run again (finished)")
    assert "1 cell run, 0 kept" in call(*command, "--rerun").stdout


def test_a_strategy_that_diverges_fails_its_cell_with_a_reason_and_the_others_go_on(toy: Path, out: Path) -> None:
    result = call("run", "--stream", "toy-stream", "--strategy", "nan,toy", "--seeds", "0", *SHORT, "--out", str(out))
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("failed: "))
    assert line.startswith("failed: nan on toy-stream, fold all, seed 0: NotFiniteError: ")
    assert {record["label"]: record["status"] for record in records(out)} == {"nan": "failed", "toy": "finished"}


def test_a_strategy_that_reads_group_labels_without_declaring_it_ends_the_run_with_2(toy: Path, out: Path) -> None:
    result = call("run", "--stream", "toy-stream", "--strategy", "peeker", "--seeds", "0", *SHORT, "--out", str(out))
    assert result.exit_code == 2
    assert "ContractError" in result.stderr
    assert "uses_group_labels=True" in result.stderr


def test_knobs_go_to_their_owner_and_stream_or_recipe_make_the_run_custom(toy: Path, out: Path) -> None:
    options = ("--stream", "toy-stream", "--strategy", "toy,other", "--seeds", "0", *SHORT, "--set", "toy.gamma=0.5")
    assert call("run", *options, "--out", str(out)).exit_code == 0
    by_label = {record["label"]: record for record in records(out)}
    assert (by_label["toy"]["identity"]["config"]["gamma"], by_label["other"]["identity"]["config"]["gamma"]) == (0.5, 1.0)
    assert by_label["toy"]["identity"]["recipe"]["epochs"] == 1
    assert by_label["toy"]["protocol"]["custom"] is True


def test_a_suite_in_a_file_is_run_like_one_from_a_plugin(toy: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(call("show", "short", "--toml").stdout)
    assert call("run", str(tmp_path / "mine.toml"), *SHORT[2:], "--out", str(out)).exit_code == 0
    (record,) = records(out)
    assert (record["protocol"]["recipe"], record["protocol"]["custom"]) == ("short", False)


@pytest.mark.parametrize("what", [["loose-suite"], ["--stream", "toy-stream", "--strategy", "loose,toy", "--seeds", "0"]])
def test_a_loose_file_brings_strategies_and_suites_into_worker_processes(
    toy: Path, out: Path, tmp_path: Path, what: list[str]
) -> None:
    (tmp_path / "my_method.py").write_text(LOOSE)
    plugin = ("--plugin", str(tmp_path / "my_method.py"))
    result = call("run", *what, *plugin, "--jobs", "2", "--set", "recipe.epochs=1", "--device", "cpu", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    assert {record["label"]: record["plugin"]["distribution"] for record in records(out)} == {
        "loose": "my_method.py",
        "toy": "shiftproof-toy",
    }
    assert [record["run_id"] for record in records(out) if str(tmp_path) in json.dumps(record)] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "expected the name of a suite, got 'toi'; did you mean 'toy'"),
        ([], "expected a suite, a TOML file, or --stream S with --strategy T"),
        (["--stream", "toy-stream"], "got --stream alone; `shiftproof list strategies` names the strategies"),
        (["--strategy", "toy"], "got --strategy alone; `shiftproof list streams` names the streams"),
        (["toy", "--stream", ""], "expected --stream as one name or several joined by ',', each once, got ''"),
        (["--stream", "toy-stream", "--strategy", "toy,toy"], "each once, got 'toy,toy'"),
        (["--stream", "toy-stream", "--strategy", "absent"], "got none: absent on toy-stream: needs shiftproof[clip]"),
        (["toy", "--out", ""], "expected a folder for --out, got ''"),
        (["toy", "--seeds", ""], "expected --seeds as integers of 0 or more, got ''"),
        (["toy", "--seeds", "٣"], "expected --seeds as integers of 0 or more, got '٣'"),
        (["toy", "--seeds", "4294967296"], "expected seeds of at most 4294967295, got 4294967296"),
        (["toy", "--seeds", "9" * 5000], "they go up to 4294967295"),
        (["toy", "--set", "toy.gamma=1", "--set", "toy.gamma=2"], "expected one value for toy.gamma, got two: 1 and 2"),
        (["toy", "--set", "toy.gamma=1", "--set", "gamma=2"], "expected one value for gamma, got two: 1 and 2"),
        (["toy", "--set", "base.file=/nope"], "expected no base.file where base.kind is random, got '/nope'"),
        (["toy", "--stream", "toy-stream"], "got both: 'toy' beside them"),
        (["absent.toml"], "expected a suite in absent.toml, got: No such file"),
        (["--stream", "toy-straem", "--strategy", "toy"], "a stream, got 'toy-straem'; did you mean 'toy-stream'"),
        (["--stream", "toy-stream", "--strategy", "tyo"], "a strategy, got 'tyo'; did you mean 'toy'"),
        (["--stream", "toy-stream", "--strategy", "toy@releasd"], "preset of toy, got 'releasd'; did you mean 'released'"),
        (["toy", "--executor", "proces"], "an executor, got 'proces'; did you mean 'process'"),
        (["toy", "--jobs", "0"], "expected --jobs of 1 or more, got 0"),
        (["toy", "--device", "gpu"], "expected --device as one of auto, cpu, cuda, got 'gpu'"),
        (["toy", "--seeds", "0,x"], "expected --seeds as integers of 0 or more, got '0,x'"),
        (["toy", "--seeds", "1,1"], "--seeds: expected seeds as integers of 0 or more, each once"),
        (["toy", "--set", "gama=1"], "got 'gama'; did you mean 'gamma'"),
        (["toy", "--set", "toy.gamma=-1"], "gamma: expected float >= 0, got '-1'"),
        (["toy", "--set", "toy.kind=c"], "kind: expected a | b, got 'c'"),
        (["toy", "--set", "stream.p_cor=1"], "got 'p_cor'; did you mean 'p_corr'"),
        (["--stream", "toy-stream", "--strategy", "toy,other", "--set", "gamma=1"], "got 2: other, toy; write other.gamma=1"),
        (["toy", "--plugin", "absent.py"], "expected a Python file as plugin, got absent.py"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("run", *arguments)
    assert not (tmp_path / "runs").exists()


def test_cuda_without_a_gpu_is_refused(toy: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "expected a CUDA device" in refused("run", "toy", "--device", "cuda", "--out", str(out))


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_runs(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper" / "out"):
        assert f"expected a folder for --out, got {out}, where file is a file" in refused("run", "toy", "--out", str(out))
    assert "File name too long" in refused("run", "toy", "--out", str(tmp_path / ("a" * 300)))


def test_records_beside_which_there_can_be_no_board_are_refused_before_anything_runs(toy: Path, out: Path) -> None:
    command = ("run", "short", "--executor", "inline", "--device", "cpu", "--out", str(out))
    call(*command)
    (file,) = (out / "records").glob("*.json")
    record = read_record(file)
    identity = {**record.identity, "stream_version": "0"}
    file.unlink()
    RecordStore(out).write(replace(record, identity=identity, run_id=sha256(identity)))
    (older,) = (out / "records").glob("*.json")
    line = refused(*command)
    assert "expected one version, split and data set of stream 'toy-stream' on a board, got stream_version 0 and 1" in line
    older.write_text(older.read_text()[:-9])
    assert f"{older.name}: " in refused(*command)
    assert list((out / "records").iterdir()) == [older]


def test_a_loose_file_with_an_installed_name_is_an_error_that_names_both(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LOOSE.replace('"loose"', '"toy"').replace("loose-suite", "other-suite"))
    line = refused("run", "toy", "--plugin", str(tmp_path / "mine.py"), "--out", str(tmp_path / "out"))
    assert "strategy 'toy', got two: plugin 'toy' (shiftproof-toy 1.0) and plugin 'mine' (mine.py loose file)" in line


def test_a_run_imports_only_the_plugins_it_needs(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = "@hookimpl\ndef shiftproof_suites():\n    return [SuiteSpec('{}', 'a suite', ('a',), ('b',))]\n"
    observer = "@hookimpl\ndef shiftproof_run_started(request):\n    pass\n"
    for name, source in (("one", suite.format("first")), ("two", suite.format("second")), ("listener", observer)):
        warm_site.install(name, source)
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "one,two,listener")
    registry = registry_for(read_catalogue(), {"suite": ["first"], "executor": ["inline"]})
    assert list(registry.suites) == ["first"]
    assert {"one", "listener"} <= set(registry.only or ())
    assert "two" not in (registry.only or ())


def test_a_run_looks_up_strategies_without_presets_streams_and_the_executor() -> None:
    suite = SuiteSpec("s", "", ("a", "b"), ("lws@released", "er"))
    known = read_catalogue()
    assert names_of(suite, "inline", known) == {"strategy": ["lws", "er", "sgd"], "stream": ["a", "b"], "executor": ["inline"]}


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("2, 1", (2, 1))])
def test_seeds_are_read_in_the_order_given(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "-1", "0;1", "a", "1.0"])
def test_seeds_that_are_none_are_an_error(text: str) -> None:
    with pytest.raises(InputError, match="expected --seeds as integers"):
        parse_seeds(text)


def test_check_runs_the_conformance_kit_and_fails_a_strategy_that_peeks(toy: Path) -> None:
    assert call("check", "toy").exit_code == 0
    result = call("check", "peeker")
    assert result.exit_code == 1
    assert "failed" in result.stdout


def written(name: str, file: Path) -> Path:
    """A strategy that is printed in the plugins' README, as a loose file."""
    text = (Path(__file__).parents[3] / "plugins/README.md").read_text()
    (example,) = (one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f'StrategySpec("{name}"' in one)
    file.write_text(example)
    return file


@pytest.mark.parametrize(
    ("name", "is_printed"), [("weight-average", False), ("median", True), ("vanilla", False), ("by-norm", True)]
)
def test_check_fine_tunes_the_experts_that_a_merge_or_a_transport_is_given(tmp_path: Path, name: str, is_printed: bool) -> None:
    plugin = ("--plugin", str(written(name, tmp_path / "mine.py"))) if is_printed else ()
    result = call("check", name, *plugin)
    assert result.exit_code == 0, result.stderr
    assert "no checkpoints: an interrupted cell starts again" in result.stdout


@pytest.fixture
def board(toy: Path, out: Path) -> Path:
    call("run", "short", "--executor", "inline", "--device", "cpu", "--out", str(out))
    return out / "board.json"


def test_a_board_is_built_again_to_the_same_bytes_but_for_its_name(board: Path, tmp_path: Path) -> None:
    for file in (tmp_path / "first/short.json", tmp_path / "second/short.json"):
        assert call("leaderboard", "build", str(board.parent), "-o", str(file)).exit_code == 0
    first, second = ((tmp_path / folder / "short.json").read_bytes() for folder in ("first", "second"))
    assert first == second == board.read_bytes()


@pytest.mark.parametrize("format", ["table", "csv", "markdown", "latex"])
def test_a_board_is_shown_in_every_format(board: Path, format: str) -> None:
    result = call("leaderboard", "show", str(board), "--format", format)
    assert result.exit_code == 0
    assert "toy" in result.stdout


def test_a_single_changed_digit_makes_a_board_fail_its_check(board: Path) -> None:
    (record,) = (board.parent / "records").glob("*.json")
    content = json.loads(record.read_text())
    content["results"]["counts"][0][0][0][0] += 1
    record.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    result = call("leaderboard", "check", str(board))
    assert result.exit_code == 2
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())
    assert result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "BOARD", "--format", "html"], "expected --format as one of table, csv, markdown, latex, got 'html'"),
        (["build", "BOARD", "-o", "x.json"], "expected a folder with records"),
        (["check", "BOARD", "--records", "nowhere"], "expected a folder with the board's records"),
        (["check", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_input_to_the_leaderboard_is_one_line(board: Path, arguments: list[str], message: str) -> None:
    assert message in refused("leaderboard", *(str(board) if part == "BOARD" else part for part in arguments))


def test_a_board_whose_records_are_not_beside_it_asks_for_them(board: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = board.rename(tmp_path / "alone/board.json")
    assert "name it with --records" in refused("leaderboard", "check", str(alone))
    assert call("leaderboard", "check", str(alone), "--records", str(tmp_path / "out/records")).exit_code == 0
