"""Suites in TOML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.suites import LARGEST_SEED, check_seeds, read_suite, suite_toml

LEAST = 'streams = ["b-digits"]\nstrategies = ["sgd"]\n'


def write(folder: Path, text: str) -> Path:
    file = folder / "my-suite.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_suite_without_name_is_called_like_its_file_and_has_three_seeds(tmp_path: Path) -> None:
    assert read_suite(write(tmp_path, LEAST)) == SuiteSpec("my-suite", "", ("b-digits",), ("sgd",), (0, 1, 2))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(database=None, derandomize=True, deadline=None)
@given(
    st.builds(
        SuiteSpec,
        name=st.just("my-suite"),
        description=texts | st.just(""),
        streams=st.lists(texts, min_size=1).map(tuple),
        strategies=st.lists(texts, min_size=1).map(tuple),
        seeds=st.lists(st.integers(0, LARGEST_SEED), min_size=1, unique=True).map(tuple),
        overrides=st.lists(texts).map(tuple),
        recipe=texts | st.just(""),
    )
)
def test_what_is_printed_reads_back_to_the_same_suite(tmp_path_factory: pytest.TempPathFactory, suite: SuiteSpec) -> None:
    file = tmp_path_factory.getbasetemp() / "printed.toml"
    file.write_bytes(suite_toml(suite).encode())
    assert read_suite(file) == suite


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("streams = [", "my-suite.toml: expected TOML, got: "),
        (LEAST + "seed = [0]", "got 'seed'; did you mean 'seeds'"),
        ('strategies = ["sgd"]', "expected streams as a list of strings, got none"),
        ('streams = "b-digits"\nstrategies = ["sgd"]', "expected streams as a list of strings, got 'b-digits'"),
        ('streams = []\nstrategies = ["sgd"]', "expected streams as a list of strings, got []"),
        ('streams = ["b-digits"]\nstrategies = [1]', "expected strategies as a list of strings, got [1]"),
        (LEAST + "name = 1", "expected name as a string, got 1"),
        (LEAST + 'name = "../up"', "lower-case words joined by '-', got '../up'"),
        (LEAST + "seeds = 3", "expected seeds as integers of 0 or more, each once, got 3"),
        (LEAST + "seeds = [4294967296]", "expected seeds of at most 4294967295, got 4294967296"),
        (LEAST + f"seeds = [{'9' * 5000}]", "my-suite.toml: expected TOML, got: "),
        ("streams = " + "[" * 5000, "my-suite.toml: expected TOML, got brackets within brackets too deep"),
        (LEAST + "overrides = [1]", "expected overrides as a list of strings, got [1]"),
    ],
)
def test_a_suite_that_cannot_be_run_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_suite(write(tmp_path, text))
    assert message in str(error.value)


def test_a_suite_file_that_is_not_there_or_not_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory; `shiftproof show SUITE --toml` prints one"):
        read_suite(tmp_path / "absent.toml")
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_suite(tmp_path / "odd.toml")


@pytest.mark.parametrize("seeds", [[], [-1], [0, 0], [True], ["0"], [0.5], "0,1", None])
def test_seeds_are_whole_numbers_each_once(seeds: Any) -> None:
    with pytest.raises(InputError, match=r"^here: expected seeds"):
        check_seeds(seeds, "here")
