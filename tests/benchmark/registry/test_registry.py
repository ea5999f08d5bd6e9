"""Plugins as the registry sees them: looked up, isolated, refused."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import unknown
from shiftproof.benchmark.registry.lookup import PluginOrigin, load_registry

TOY = """
    from dataclasses import dataclass
    from shiftproof.benchmark import DataExperience

    @dataclass(frozen=True)
    class ToyConfig:
        gamma: float = 0.5

    class Toy:
        def __init__(self, config, context):
            self.config = config

    @hookimpl
    def shiftproof_strategies():
        presets = {"released": ToyConfig(gamma=2.0)}
        return [StrategySpec("toy", Toy, ToyConfig, DataExperience, "Toy et al.", presets)]
"""


def suite(name: str) -> str:
    return f"""
        @hookimpl
        def shiftproof_suites():
            return [SuiteSpec("{name}", "a suite", ("b-digits",), ("sgd",))]
    """


def write(file: Path, source: str) -> Path:
    file.write_text("from shiftproof.benchmark import StrategySpec, SuiteSpec, hookimpl\n" + textwrap.dedent(source))
    return file


def test_the_harness_always_brings_metrics_backbones_and_executors() -> None:
    registry = load_registry(only=[])
    assert "worst" in registry.metrics
    assert "resnet18" in registry.backbones
    assert {"inline", "process"} <= set(registry.executors)


def test_a_strategy_is_found_with_the_defaults_of_its_config(site: Any) -> None:
    site.install("toy", TOY)
    spec, preset, config = load_registry(["toy"]).strategy("toy")
    assert (spec.reference, preset, config.gamma) == ("Toy et al.", "", 0.5)


def test_a_preset_is_chosen_behind_an_at_sign(site: Any) -> None:
    site.install("toy", TOY)
    _, preset, config = load_registry(["toy"]).strategy("toy@released")
    assert (preset, config.gamma) == ("released", 2.0)


def test_the_origin_names_distribution_version_entry_point_and_module(site: Any) -> None:
    site.install("toy", TOY, version="2.5")
    registry = load_registry(["toy"])
    assert registry.origin("strategy", "toy") == PluginOrigin("shiftproof-toy", "2.5", "toy", "toy_toy")


def test_an_unknown_preset_is_an_error_that_lists_the_presets(site: Any) -> None:
    site.install("toy", TOY)
    with pytest.raises(InputError, match="preset of toy, got 'relased'; did you mean 'released'"):
        load_registry(["toy"]).strategy("toy@relased")


@pytest.mark.parametrize("kind", ["strategy", "stream", "suite", "metric", "backbone", "executor"])
def test_a_look_up_says_what_kind_of_thing_is_unknown(kind: str) -> None:
    with pytest.raises(InputError, match=f"expected the name of an? {kind}, got 'nowhere'"):
        getattr(load_registry([]), kind)("nowhere")


def test_a_look_up_offers_the_nearest_spelling() -> None:
    with pytest.raises(InputError, match="did you mean 'worst'"):
        load_registry([]).metric("worts")


def test_a_plugin_that_fails_to_import_does_not_disturb_the_others(site: Any) -> None:
    site.install("broken", "import a_module_that_is_not_there\n")
    site.install("fine", suite("fine-suite"))
    registry = load_registry(["broken", "fine"])
    assert "fine-suite" in registry.suites
    (problem,) = registry.problems
    assert (problem.name, problem.distribution) == ("broken", "shiftproof-broken")
    assert problem.error == "ModuleNotFoundError: No module named 'a_module_that_is_not_there' (toy_broken.py, line 2)"


@pytest.mark.parametrize(
    "source",
    ["raise SystemExit(3)", "raise BaseException('odd')", "this is no python", "1 / 0", "raise Exception('two\\n lines')"],
)
def test_whatever_an_import_raises_ends_in_one_line(site: Any, source: str) -> None:
    site.install("broken", source)
    (problem,) = load_registry(["broken"]).problems
    assert "\n" not in problem.error
    assert "toy_broken.py, line 2" in problem.error


def test_the_error_of_a_plugin_is_free_of_absolute_paths(site: Any) -> None:
    site.install("broken", "raise OSError('cannot read ' + __file__)")
    (problem,) = load_registry(["broken"]).problems
    assert problem.error == "OSError: cannot read toy_broken.py (toy_broken.py, line 2)"


def test_strict_makes_a_broken_plugin_fatal(site: Any) -> None:
    site.install("broken", "1 / 0")
    with pytest.raises(InputError, match=r"plugin 'broken' \(shiftproof-broken 1.0\) cannot be used: ZeroDivisionError"):
        load_registry(["broken"], strict=True)


def test_a_name_that_may_be_in_a_broken_plugin_is_reported_with_its_reason(site: Any) -> None:
    site.install("broken", "1 / 0")
    with pytest.raises(InputError, match=r"got 'mine'.*plugin 'broken' did not load: ZeroDivisionError"):
        load_registry(["broken"]).strategy("mine")


def test_a_near_spelling_is_offered_instead_of_the_plugins_that_are_broken(site: Any) -> None:
    site.install("broken", "1 / 0")
    with pytest.raises(InputError) as error:
        load_registry(["broken"]).metric("worts")
    assert "did you mean 'worst'" in str(error.value)
    assert "broken" not in str(error.value)


def test_several_broken_plugins_are_named_without_their_reasons(site: Any) -> None:
    for name in ("broken", "worse"):
        site.install(name, "1 / 0")
    with pytest.raises(InputError, match=r"2 plugins did not load: broken, worse; `shiftproof plugins` says why$"):
        load_registry(["broken", "worse"]).strategy("mine")


@pytest.mark.parametrize(("kind", "command"), [("strategy", "list strategies"), ("name", "list KIND")])
def test_where_there_are_too_many_names_the_command_that_lists_them_is_told(kind: str, command: str) -> None:
    assert f"(`shiftproof {command}` names all that are known)" in str(unknown(kind, "zzz", map(str, range(41))))


def test_a_loose_file_is_given_once_and_is_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", suite("mine"))
    with pytest.raises(InputError, match=r"expected every plugin file once, got one that is given twice: .*mine.py"):
        load_registry([], [file, tmp_path / "." / "mine.py"])
    (tmp_path / "other").mkdir()
    namesake = write(tmp_path / "other" / "mine.py", suite("theirs"))
    with pytest.raises(InputError, match=r"expected plugin files of different names, got .*mine.py, .*mine.py; rename one"):
        load_registry([], [file, namesake])
    with pytest.raises(InputError, match=r"expected a Python file as plugin, got .*, which is a folder"):
        load_registry([], [tmp_path])


def test_a_misspelt_hook_is_named_with_its_plugin_and_the_nearest_spelling(site: Any) -> None:
    site.install("typo", "@hookimpl\ndef shiftproof_stratgies():\n    return []\n")
    with pytest.raises(InputError, match=r"plugin 'typo'.*got 'shiftproof_stratgies'; did you mean 'shiftproof_strategies'"):
        load_registry(["typo"], strict=True)


def test_a_hook_under_a_name_of_its_own_choice_is_checked_as_well(site: Any) -> None:
    site.install("typo", "@hookimpl(specname='shiftproof_suits')\ndef contribute():\n    return []\n")
    with pytest.raises(InputError, match="did you mean 'shiftproof_suites'"):
        load_registry(["typo"], strict=True)


def test_a_hook_that_lacks_its_mark_is_refused_instead_of_passed_over(site: Any) -> None:
    site.install("bare", "def shiftproof_suites():\n    return []\n")
    with pytest.raises(InputError, match="expected shiftproof_suites to be marked as a hook; write @hookimpl"):
        load_registry(["bare"], strict=True)


def test_a_hook_with_an_argument_that_does_not_exist_is_refused(site: Any) -> None:
    site.install("odd", "@hookimpl\ndef shiftproof_run_started(requests):\n    pass\n")
    with pytest.raises(InputError, match=r"plugin 'odd'.*requests"):
        load_registry(["odd"], strict=True)


def test_a_module_without_any_hook_is_no_plugin(site: Any) -> None:
    site.install("empty", "x = 1")
    with pytest.raises(InputError, match="expected at least one hook, got none"):
        load_registry(["empty"], strict=True)


def test_an_object_can_carry_the_hooks(site: Any) -> None:
    source = """
        class Plugin:
            @hookimpl
            def shiftproof_suites(self):
                return [SuiteSpec("from-object", "a suite", ("b-digits",), ("sgd",))]
        plugin = Plugin()
    """
    site.install("object", source, value="toy_object:plugin")
    assert "from-object" in load_registry(["object"]).suites


@pytest.mark.parametrize("answer", ["None", "'names'", "[1]", "[MetricSpec('m', len, True, 'd')]"])
def test_a_hook_must_return_specs_of_its_kind(site: Any, answer: str) -> None:
    site.install("odd", f"@hookimpl\ndef shiftproof_suites():\n    return {answer}\n")
    with pytest.raises(InputError, match=r"plugin 'odd'.*expected"):
        load_registry(["odd"], strict=True)


def test_two_plugins_with_one_name_are_an_error_that_names_both(site: Any) -> None:
    site.install("one", suite("same"))
    site.install("two", suite("same"))
    with pytest.raises(InputError, match=r"suite 'same', got two: plugin 'one' \(shiftproof-one 1.0\) and plugin 'two'"):
        load_registry(["one", "two"])


def test_one_name_may_stand_for_things_of_different_kinds(site: Any) -> None:
    site.install("one", suite("worst"))
    registry = load_registry(["one"])
    assert registry.suite("worst").name == registry.metric("worst").name


def test_the_environment_limits_what_loads(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("one", suite("first"))
    site.install("two", suite("second"))
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "two, metrics")
    registry = load_registry()
    assert list(registry.suites) == ["second"]
    assert {"worst", "digits-cnn", "inline"} <= {*registry.metrics, *registry.backbones, *registry.executors}


def test_a_plugin_in_the_environment_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "metrcs")
    with pytest.raises(InputError, match="expected the name of a plugin, got 'metrcs'; did you mean 'metrics'"):
        load_registry()


def test_only_the_named_entry_points_are_imported(site: Any) -> None:
    site.install("one", suite("first"))
    site.install("two", suite("second"))
    load_registry(["one"])
    assert "toy_one" in sys.modules
    assert "toy_two" not in sys.modules


def test_a_loose_file_is_a_plugin_without_installation(tmp_path: Path) -> None:
    file = write(tmp_path / "my_method.py", TOY)
    registry = load_registry([], [file])
    assert registry.strategy("toy")[2].gamma == 0.5
    assert registry.origin("strategy", "toy").distribution == "my_method.py"
    assert str(tmp_path) not in str(registry.origin("strategy", "toy"))


def test_a_loose_file_is_read_anew_each_time_and_leaves_nothing_beside_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "my_suite.py", suite("before"))
    load_registry([], [file])
    write(file, suite("behind"))  # as many bytes, within the same second
    assert list(load_registry([], [file]).suites) == ["behind"]
    assert [path.name for path in tmp_path.iterdir()] == ["my_suite.py"]


def test_another_process_loads_a_loose_file_under_the_same_module_name(tmp_path: Path) -> None:
    file = write(tmp_path / "my_method.py", TOY)
    here = load_registry([], [file]).strategy("toy")[0].build.__module__
    code = (
        "import sys, pathlib; from shiftproof.benchmark.registry.lookup import load_registry; "
        "print(load_registry([], [pathlib.Path(sys.argv[1])]).strategy('toy')[0].build.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


@pytest.mark.parametrize("name", ["not_there.py", "my-method.py", "my_method.txt"])
def test_a_plugin_file_that_cannot_be_one_is_an_error(tmp_path: Path, name: str) -> None:
    if name != "not_there.py":
        write(tmp_path / name, TOY)
    with pytest.raises(InputError, match=name):
        load_registry([], [tmp_path / name])


def test_a_loose_file_that_is_broken_is_always_fatal(tmp_path: Path) -> None:
    file = write(tmp_path / "my_method.py", "1 / 0")
    with pytest.raises(InputError, match=r"plugin 'my_method' .*ZeroDivisionError.*my_method.py, line 2"):
        load_registry([], [file])
    assert "shiftproof_loose_my_method" not in sys.modules


def test_what_a_registry_was_made_from_makes_it_again(site: Any, tmp_path: Path) -> None:
    site.install("one", suite("first"))
    file = write(tmp_path / "my_method.py", TOY)
    registry = load_registry(["one"], [file])
    again = load_registry(registry.only, registry.files)
    assert (list(again.suites), list(again.strategies)) == (["first"], ["toy"])


OBSERVER = """
    seen = []

    @hookimpl
    def shiftproof_run_finished(record):
        seen.append(record)
        {act}
"""


def test_an_observer_that_raises_is_reported_once_and_the_others_are_told(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    site.install("a-bad", OBSERVER.format(act="raise RuntimeError('no disk')"))
    site.install("b-good", OBSERVER.format(act="pass"))
    registry = load_registry(["a-bad", "b-good"])
    with caplog.at_level(logging.WARNING, "shiftproof"):
        registry.observers.run_finished("first")  # type: ignore[arg-type]
        registry.observers.run_finished("second")  # type: ignore[arg-type]
    assert sys.modules["toy_b_good"].seen == ["first", "second"]
    (message,) = caplog.messages
    assert "plugin 'a-bad'" in message
    assert "shiftproof_run_finished" in message
    assert "no disk" in message


def test_an_observer_may_leave_out_arguments(site: Any) -> None:
    source = "seen = []\n@hookimpl\ndef shiftproof_experience_learned(experience):\n    seen.append(experience)\n"
    site.install("short", source)
    load_registry(["short"]).observers.experience_learned(None, "even", {}, [])  # type: ignore[arg-type]
    assert sys.modules["toy_short"].seen == ["even"]
