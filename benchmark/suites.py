"""Suites in TOML files: read one, or print one to start from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import NAME, did_you_mean

LARGEST_SEED = 2**32 - 1  # of numpy's legacy generators, which strategies may use
KEYS = ("name", "description", "streams", "strategies", "seeds", "overrides", "recipe")


def read_suite(path: Path) -> SuiteSpec:
    """The suite in a TOML file; without a `name` it is called like the file.

    Raises:
        InputError: If the file cannot be read, is not TOML, has unknown keys, lacks one, or holds a value of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "text that is not UTF-8"
        raise InputError(f"expected a suite in {path}, got: {reason}; `shiftproof show SUITE --toml` prints one") from error
    except RecursionError as error:
        raise InputError(f"{path.name}: expected TOML, got brackets within brackets too deep to be read") from error
    except ValueError as error:  # not TOML, or a number of more digits than Python reads
        raise InputError(f"{path.name}: expected TOML, got: {error}") from error
    for key in content:
        if key not in KEYS:
            raise InputError(f"{path.name}: expected keys among {', '.join(KEYS)}, got {key!r}{did_you_mean(key, KEYS)}")
    name = _text(content, "name", path) or path.stem
    if not NAME.fullmatch(name):
        raise InputError(f"{path.name}: expected a name in lower-case words joined by '-', got {name!r}")
    return SuiteSpec(
        name,
        _text(content, "description", path),
        _texts(content, "streams", path, needed=True),
        _texts(content, "strategies", path, needed=True),
        check_seeds(content["seeds"], path.name) if "seeds" in content else SuiteSpec.seeds,
        _texts(content, "overrides", path),
        _text(content, "recipe", path),
    )


def suite_toml(suite: SuiteSpec) -> str:
    """A file that `read_suite` reads back to the same suite."""
    lines = [f"name = {_quoted(suite.name)}", f"description = {_quoted(suite.description)}"]
    lines += [f"{key} = [\n{_listed(getattr(suite, key))}]" for key in ("streams", "strategies")]
    lines.append(f"seeds = {list(suite.seeds)}")
    if suite.overrides:
        lines.append(f"overrides = [\n{_listed(suite.overrides)}]")
    if suite.recipe:
        lines.append(f"recipe = {_quoted(suite.recipe)}")
    return "\n".join(lines) + "\n"


def check_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    """Seeds as a tuple.

    Raises:
        InputError: Unless they are integers of 0 or more, none above `LARGEST_SEED`, each once, and at least one.
    """
    whole = isinstance(seeds, list) and all(
        isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds
    )
    if not whole or not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"{where}: expected seeds as integers of 0 or more, each once, got {seeds!r}; write for example 0,1,2")
    if max(seeds) > LARGEST_SEED:
        raise InputError(f"{where}: expected seeds of at most {LARGEST_SEED}, got {max(seeds)}; write for example 0,1,2")
    return tuple(seeds)


def _text(content: dict[str, Any], key: str, path: Path) -> str:
    value = content.get(key, "")
    if not isinstance(value, str):
        raise InputError(f"{path.name}: expected {key} as a string, got {value!r}")
    return value


def _texts(content: dict[str, Any], key: str, path: Path, needed: bool = False) -> tuple[str, ...]:
    values = content.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values) or (needed and not values):
        got = repr(values) if key in content else "none"
        raise InputError(f'{path.name}: expected {key} as a list of strings, got {got}; write for example {key} = ["name"]')
    return tuple(values)


def _listed(values: Iterable[str]) -> str:
    return "".join(f"    {_quoted(value)},\n" for value in values)


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are those of JSON; DEL alone is allowed there and not here."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
