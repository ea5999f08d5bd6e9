"""The command line but for `run`: what it prints, how it ends, how fast it answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shiftproof.benchmark.cli.console import layout
from shiftproof.benchmark.cli.main import app
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.suites import read_suite


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def refused(*arguments: str) -> str:
    """The one line on standard error of a call that ends with 2 and prints nothing else."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return str(line)


def test_help_names_every_command() -> None:
    commands = ["run", "list", "show", "plugins", "new-strategy", "check", "doctor", "data", "leaderboard", "experts"]
    commands += ["merge", "transport", "analyze"]
    assert [command for command in commands if f"  {command} " not in call("--help").stdout] == []
    assert call().stdout == call("--help").stdout


def test_the_version_is_that_of_the_package() -> None:
    assert call("--version").stdout.split()[0] == "shiftproof"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "No such command 'lst'. Did you mean 'list'"),
        (["--nothing"], "No such option: --nothing"),
        (["list"], "Missing argument 'KIND'; see shiftproof list --help"),
        (["run", "--jobs", "x"], "Invalid value for '--jobs'"),
        (["run", "--jobs", "abc"], "'abc'"),
        (["leaderboard"], "Missing command"),
        (["experts", "import", "a" * 300], "expected a path, got 'aaa"),
    ],
)
def test_wrong_usage_is_one_line_and_ends_with_2(arguments: list[str], message: str) -> None:
    line = refused(*arguments)
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("strategies", ["toy", "other", "nan", "peeker"]),
        ("streams", ["toy-stream", "filed"]),
        ("suites", ["toy", "short"]),
        ("metrics", ["average", "worst", "forgetting"]),
        ("backbones", ["digits-cnn", "resnet18"]),
        ("executors", ["inline", "process", "slurm", "ray"]),
    ],
)
def test_list_names_everything_of_a_kind(toy: Path, kind: str, names: list[str]) -> None:
    lines = call("list", kind).stdout.splitlines()
    assert set(names) <= {line.split()[0] for line in lines}
    assert set(names) <= {row["name"] for row in json.loads(call("list", kind, "--json").stdout)}


def test_list_says_where_a_strategy_comes_from_and_why_one_is_unavailable(toy: Path) -> None:
    (line,) = (line for line in call("list", "strategies").stdout.splitlines() if line.startswith("absent"))
    assert "unavailable: needs shiftproof[clip]" in line
    assert line.endswith("shiftproof-toy 1.0")


def test_an_unknown_kind_is_an_error_with_the_nearest_one(toy: Path) -> None:
    assert "got 'strategy'; did you mean 'strategies'" in refused("list", "strategy")


def test_show_prints_facts_knobs_presets_and_citation(toy: Path) -> None:
    shown = call("show", "toy").stdout
    assert "strategy toy: Cross-entropy times gamma." in shown
    assert "reference: Toy et al., Journal of Toys, 2024" in shown
    assert "preset toy@released: gamma=2.0" in shown
    assert "gamma  1.0      float >= 0  factor of the loss, in [0, inf)" in shown


def test_show_prints_every_kind_that_has_the_name(toy: Path) -> None:
    shown = call("show", "toy").stdout
    assert "strategy toy: " in shown
    assert "suite toy: strategy and suite of one name" in shown


@pytest.mark.parametrize("name", ["toy-stream", "short", "worst", "digits-cnn", "inline", "other"])
def test_show_works_for_every_kind(toy: Path, name: str) -> None:
    assert f" {name}: " in call("show", name).stdout


def test_show_knows_presets_and_offers_the_nearest_name(toy: Path) -> None:
    assert call("show", "other").exit_code == 0
    assert "got 'relaesed'; did you mean 'released'" in refused("show", "toy@relaesed")
    assert "got 'toi'; did you mean 'toy'" in refused("show", "toi")


@pytest.mark.parametrize("name", ["toy", "short"])
def test_a_printed_suite_reads_back_as_the_same_suite(toy: Path, tmp_path: Path, name: str) -> None:
    printed = call("show", name, "--toml").stdout
    (tmp_path / "suite.toml").write_text(printed)
    suite = read_suite(tmp_path / "suite.toml")
    facts = {row["name"]: row for row in json.loads(call("list", "suites", "--json").stdout)}[name]
    for fact in ("streams", "strategies", "seeds", "overrides"):
        assert list(getattr(suite, fact)) == facts[fact]
    assert (suite.name, suite.description, suite.recipe) == (name, facts["summary"], facts["recipe"])


def test_debug_gives_the_traceback_instead_of_the_line(toy: Path) -> None:
    result = call("--debug", "show", "toi")
    assert isinstance(result.exception, InputError)


def test_plugins_shows_a_row_for_each_with_what_it_contributes(toy: Path) -> None:
    (line,) = (line for line in call("plugins").stdout.splitlines() if line.startswith("toy"))
    assert line.split()[:4] == ["toy", "shiftproof-toy", "1.0", "ok"]
    assert "strategies: toy, other, nan, peeker, absent; " in line.replace("suites: toy, short; ", "") + "; "
    rows = json.loads(call("plugins", "--json").stdout)["plugins"]
    assert {"metrics", "backbones", "executors", "toy"} == {row["name"] for row in rows}


def test_a_broken_plugin_is_a_row_and_only_strict_makes_it_fatal(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_site.install("bad", "1 / 0")
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "bad")
    result = call("plugins")
    assert result.exit_code == 0
    assert (
        "bad        shiftproof-bad  1.0      broken  ZeroDivisionError: division by zero (toy_bad.py, line 2)" in result.stdout
    )
    assert call("plugins", "--strict").exit_code == 2
    assert call("list", "metrics").exit_code == 0
    assert "broken: bad; `shiftproof plugins` says why" in call("list", "metrics").stderr


def test_two_plugins_with_one_name_end_list_with_2_and_are_shown_by_plugins(
    warm_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = "@hookimpl\ndef shiftproof_suites():\n    return [SuiteSpec('same', 'a suite', ('a',), ('b',))]\n"
    warm_site.install("one", suite)
    warm_site.install("two", suite)
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "one,two")
    assert "got two: plugin 'one' (shiftproof-one 1.0) and plugin 'two' (shiftproof-two 1.0)" in refused("list", "suites")
    assert call("list", "metrics").exit_code == 0
    assert "conflict: " in call("plugins").stderr
    assert call("plugins", "--strict").exit_code == 2


def test_data_status_lists_files_and_where_they_come_from(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img/list.csv").write_text("")
    shown = call("data", "status", "filed", "--root", str(tmp_path)).stdout
    assert [line.split() for line in shown.splitlines()[2:4]] == [["img/list.csv", "present"], ["img/data.npz", "missing"]]
    assert "source: https://toys.example" in shown
    assert "licence: CC BY 4.0" in shown


def test_a_stream_without_files_says_so(toy: Path) -> None:
    assert "toy-stream: needs no files" in call("data", "status", "toy-stream").stdout


def test_data_prepare_refuses_while_files_are_missing(toy: Path, tmp_path: Path) -> None:
    line = refused("data", "prepare", "filed", "--root", str(tmp_path))
    assert "expected img/list.csv, img/data.npz below" in line
    assert "https://toys.example (CC BY 4.0)" in line


def test_data_prepare_builds_the_stream_and_prints_its_hashes(toy: Path) -> None:
    shown = call("data", "prepare", "toy-stream").stdout
    assert "train: 128 samples in 2 sets" in shown
    assert f"split sha256: {'0' * 64}" in shown


def test_new_strategy_writes_a_package_and_refuses_a_name_that_is_taken(toy: Path, tmp_path: Path) -> None:
    assert call("new-strategy", "my-method", "--into", str(tmp_path)).exit_code == 0
    assert (tmp_path / "shiftproof-my-method/pyproject.toml").is_file()
    assert "got 'toy', which plugin 'toy' (shiftproof-toy 1.0) has" in refused("new-strategy", "toy", "--into", str(tmp_path))
    assert not (tmp_path / "shiftproof-toy").exists()


def test_columns_stay_within_the_terminal_and_lose_no_word() -> None:
    text = layout(["name", "what", "from"], [["a-long-name", "many words " * 12, "here"], ["b", "", "there"]], 60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("words") == 12
    assert "a-long-name" in text


def test_columns_are_whole_where_there_is_no_terminal() -> None:
    assert layout(["a"], [["x " * 200]], None).splitlines()[2] == ("x " * 200).strip()


MAIN = "from shiftproof.benchmark.cli.main import main; main()"


def test_a_disk_that_is_full_is_one_line_and_ends_with_2(toy: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", MAIN, "list", "metrics"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "error: expected to write, got: No space left on device; free space or write elsewhere\n"
    assert done.returncode == 2


def test_a_reader_who_has_left_is_told_nothing(toy: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", MAIN, "list", "metrics"], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 1)


def test_letters_that_a_terminal_lacks_are_replaced() -> None:
    prints = "from shiftproof.benchmark.cli import console, main; main.app = lambda: console.console().print('n' + chr(233))"
    limits = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", f"{prints}; main.main()"]
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("n?\n", "", 0)


def test_an_interrupt_while_commands_are_imported_shows_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "list", "metrics"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("stopped\n", 130)


HEAVY = ("torch", "avalanche", "sklearn", "scipy", "numpy", "torchvision", "matplotlib", "rich.table")
FAST = (
    ["--help"],
    ["list", "strategies"],
    ["list", "metrics", "--json"],
    ["show", "toy"],
    ["plugins"],
    ["data", "status", "filed"],
)

PROBE = f"""
import sys
from shiftproof.benchmark.cli.main import main
try:
    main()
except SystemExit as exit:
    code = exit.code
print("heavy:", [name for name in {HEAVY} if name in sys.modules], code, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", FAST, ids=" ".join)
def test_what_only_looks_imports_neither_torch_nor_avalanche(toy: Path, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr == "heavy: [] 0\n"


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall time and processor time of a process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["list", "strategies"], ["plugins"]], ids=" ".join)
def test_what_only_looks_answers_within_0_3_seconds(
    toy: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Processor time, which is wall time on an idle machine; a slow machine is given eight bare interpreters instead."""
    ours = [sys.executable, "-c", "from shiftproof.benchmark.cli.main import main; main()", *arguments]
    runs = [(seconds(ours), seconds([sys.executable, "-c", "import json, inspect, pathlib"])) for _ in range(7)]
    wall, busy = (min(run[0][which] for run in runs) for which in (0, 1))
    bare = min(run[1][1] for run in runs)
    with capsys.disabled():
        print(f"\n{' '.join(arguments)}: {wall:.3f} s, busy {busy:.3f} s, bare {bare:.3f} s, load {os.getloadavg()[0]:.1f}")
    assert busy < max(0.3, 8 * bare)
