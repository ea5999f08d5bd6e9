"""Facts on plugins that are not imported: harvested once, renewed when something changes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.registry.catalogue import Catalogue, read_catalogue

# Counts its imports in a file beside it.
SUITE = """
    import pathlib
    with open(pathlib.Path(__file__).with_suffix(".count"), "a") as counter:
        counter.write("|")

    @hookimpl
    def shiftproof_suites():
        return [SuiteSpec("{name}", "{summary}", ("b-digits",), ("sgd", "er@x"), (0, 7), ("recipe.epochs=4",), "short")]
"""

STRATEGY = '''
    from dataclasses import dataclass
    from shiftproof.benchmark import DataExperience

    @dataclass(frozen=True)
    class ToyConfig:
        gamma: float = 0.5  # of the mean
        kind: str = "a"

    class Toy:
        """What it does.

        More about it.
        """

    @hookimpl
    def shiftproof_strategies():
        presets = {"released": ToyConfig(gamma=2.0)}
        return [StrategySpec("toy", Toy, ToyConfig, DataExperience, "Toy et al.", presets, uses_group_labels=True)]

    @hookimpl
    def shiftproof_run_finished(record):
        pass
'''


def limited(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", ",".join((*names, "metrics")))


def imports(file: Path) -> int:
    counter = file.with_suffix(".count")
    return len(counter.read_text()) if counter.exists() else 0


def edit(file: Path, before: str, after: str) -> None:
    file.write_text(file.read_text().replace(before, after))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**10))  # pyc files tell times to the second


def suites(catalogue: Catalogue) -> dict[str, str]:
    return {name: item.facts["summary"] for name, (item, _) in catalogue.items("suite").items()}


def test_facts_are_harvested_once_and_no_plugin_is_imported_here(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    limited(monkeypatch, "one")
    assert suites(read_catalogue()) == suites(read_catalogue()) == {"first": "a suite"}
    assert imports(file) == 1
    assert "toy_one" not in sys.modules


def test_a_suite_can_be_run_from_its_facts(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    limited(monkeypatch, "one")
    assert read_catalogue().item("suite", "first").facts == {
        "summary": "a suite",
        "streams": ["b-digits"],
        "strategies": ["sgd", "er@x"],
        "seeds": [0, 7],
        "overrides": ["recipe.epochs=4"],
        "recipe": "short",
    }


def test_the_facts_of_a_strategy_are_those_of_its_spec(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_site.install("toy", STRATEGY)
    limited(monkeypatch, "toy")
    known = read_catalogue()
    facts = known.item("strategy", "toy").facts
    assert (facts["summary"], facts["consumes"], facts["reference"]) == ("What it does.", "DataExperience", "Toy et al.")
    assert (facts["uses_group_labels"], facts["needs_data"], facts["unavailable"]) == (True, False, "")
    assert facts["config"][0] == {"name": "gamma", "type": "float", "default": "0.5", "comment": "of the mean"}
    assert facts["presets"] == {"released": {"gamma": "2.0"}}
    assert known.with_hook(["shiftproof_run_finished"]) == {"toy"}
    assert known.providers({"strategy": ["toy", "nowhere"], "suite": ["toy"]}) == {"toy"}


def test_an_edited_plugin_refreshes_its_row_and_no_other(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = warm_site.install("one", SUITE.format(name="first", summary="before"))
    second = warm_site.install("two", SUITE.format(name="second", summary="stays"))
    limited(monkeypatch, "one", "two")
    assert suites(read_catalogue()) == {"first": "before", "second": "stays"}
    edit(first, "before", "afterwards")
    assert suites(read_catalogue()) == {"first": "afterwards", "second": "stays"}
    assert (imports(first), imports(second)) == (2, 1)


def test_a_refresh_imports_every_plugin_again(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    limited(monkeypatch, "one")
    read_catalogue()
    read_catalogue(refresh=True)
    assert imports(file) == 2


def test_a_broken_plugin_is_a_row_with_its_error_until_it_is_mended(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = warm_site.install("one", SUITE.format(name="first", summary="a suite") + "\n    1 / 0\n")
    limited(monkeypatch, "one")
    (error,) = read_catalogue().broken.values()
    assert error.startswith("ZeroDivisionError: division by zero (toy_one.py, line ")
    edit(file, "1 / 0", "")
    assert read_catalogue().broken == {}


def test_a_broken_plugin_is_tried_again_when_packages_were_installed(
    warm_site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "site"))  # where pip would install
    warm_site.install("one", "import toy_missing\n@hookimpl\ndef shiftproof_suites():\n    return []\n")
    limited(monkeypatch, "one")
    assert "toy_missing" in read_catalogue().broken["one"]
    (warm_site.folder / "toy_missing.py").write_text("")
    assert read_catalogue().broken == {}


def test_an_import_that_takes_the_process_down_costs_only_its_own_row(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_site.install("crash", "import os\nos._exit(7)\n")
    warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    limited(monkeypatch, "crash", "one")
    known = read_catalogue()
    assert known.broken == {"crash": "its import ended the process with status 7"}
    assert suites(known) == {"first": "a suite"}


def test_what_a_plugin_prints_at_import_does_no_harm(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_site.install("loud", "print('hello')\n" + "@hookimpl\ndef shiftproof_suites():\n    return []\n")
    limited(monkeypatch, "loud")
    assert read_catalogue().broken == {}


def test_two_plugins_with_one_name_are_an_error_that_names_both(warm_site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warm_site.install("one", SUITE.format(name="same", summary="a"))
    warm_site.install("two", SUITE.format(name="same", summary="b"))
    limited(monkeypatch, "one", "two")
    known = read_catalogue()
    with pytest.raises(InputError, match=r"suite 'same', got two: plugin 'one' \(shiftproof-one 1.0\) and plugin 'two'"):
        known.items("suite")
    assert len(known.conflicts()) == 1


def test_an_unknown_name_is_looked_for_among_all_plugins_and_the_broken_ones_are_named_where_none_is_near(
    warm_site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    warm_site.install("bad", "1 / 0")
    limited(monkeypatch, "one", "bad")
    with pytest.raises(InputError, match=r"suite, got 'frist'; did you mean 'first'\? \(known: first\)$"):
        read_catalogue().item("suite", "frist")
    with pytest.raises(InputError, match=r"suite, got 'mine' \(known: first\); plugin 'bad' did not load: ZeroDivisionError"):
        read_catalogue().item("suite", "mine")


def test_a_damaged_catalogue_is_made_again(warm_site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    limited(monkeypatch, "one")
    read_catalogue()
    (file,) = (tmp_path / "cache/catalogue").glob("*.json")
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert suites(read_catalogue()) == {"first": "a suite"}
    assert json.loads(file.read_text())["plugins"].keys() <= json.loads(whole)["plugins"].keys()


def test_the_catalogue_holds_no_absolute_path(warm_site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warm_site.install("bad", "raise OSError(f'cannot read {__file__}')")
    warm_site.install("one", SUITE.format(name="first", summary="a suite"))
    limited(monkeypatch, "bad", "one")
    read_catalogue()
    (file,) = (tmp_path / "cache/catalogue").glob("*.json")
    text = file.read_text()
    assert "cannot read toy_bad.py" in text
    assert [path for path in (str(tmp_path), sys.prefix, str(Path.home()), os.getcwd()) if path in text] == []


def test_a_cache_folder_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"expected a cache folder that can be written.*SHIFTPROOF_CACHE"):
        read_catalogue()
