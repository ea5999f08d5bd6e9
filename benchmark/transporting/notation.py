"""Specifications written by hand, as JSON.

    {"axes": {"fc1.weight": ["hidden", null], "attn.in_proj_weight": ["attn + attn + attn", "stream"]},
     "heads": {"attn": 4}, "chains": [["stream", "middle"]], "output": ""}

"axes" has an entry for every dimension of every tensor: the name of the permutation that it carries, or null. "a + b" is an
axis whose first stretch carries a and the rest b; "a * 16" holds 16 consecutive elements for every unit, as a flattened map
does. The other three may be left out; `PermutationSpec` says what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.records import parse_json
from shiftproof.benchmark.transporting.specification import Axis, PermutationSpec, Run, Shapes, specify

RUN = re.compile(r"([^\s+*]+)(?: ?\* ?([1-9][0-9]*))?")
SHOWN = 60  # characters of a wrong value in an error
FIELDS = ("axes", "heads", "chains", "output")


def read_specification(path: Path, shapes: Shapes) -> PermutationSpec:
    """A specification from a file.

    Raises:
        InputError: If the file cannot be read, is no such JSON, or does not fit the shapes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise InputError(f"{path}: expected a specification in JSON, got {reason}; name a file that can be read") from None
    return from_text(text, shapes, str(path))


def from_text(text: str, shapes: Shapes, where: str = "specification") -> PermutationSpec:
    """A specification from its text.

    Args:
        where: It came from, for errors.

    Raises:
        InputError: As `read_specification`.
    """
    content = parse_json(text, where)
    odd = sorted(content.keys() - set(FIELDS))
    if odd or "axes" not in content:
        raise InputError(f"{where}: expected the fields {', '.join(FIELDS)}, got {', '.join(map(repr, odd)) or 'no axes'}")
    axes = {name: _axes(each, f"{where}: axes of {name!r}") for name, each in _object(content, "axes", where).items()}
    heads = _object(content, "heads", where)
    for name, count in heads.items():
        if type(count) is not int:
            raise InputError(f"{where}: expected a number of heads for {name!r}, got {_shown(count)}")
    chains, output = content.get("chains", []), content.get("output", "")
    if not isinstance(chains, list) or not all(isinstance(chain, list) and all(map(_is_name, chain)) for chain in chains):
        raise InputError(f"{where}: expected chains as lists of names, got {_shown(chains)}")
    if not isinstance(output, str) or (output and not _is_name(output)):
        raise InputError(f"{where}: expected the name of a permutation as output, got {_shown(output)}")
    try:
        return specify(axes, shapes, heads, chains, output)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def to_text(specification: PermutationSpec) -> str:
    """The text that `from_text` reads, a tensor a line."""
    axes = (
        f"  {json.dumps(name)}: {json.dumps([' + '.join(map(str, axis)) or None for axis in each])}"
        for name, each in specification.axes.items()
    )
    parts = [
        '"axes": {\n' + ",\n".join(axes) + "\n }",
        f'"heads": {json.dumps(dict(specification.heads))}',
        f'"chains": {json.dumps(specification.chains)}',
        f'"output": {json.dumps(specification.output)}',
    ]
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _object(content: Mapping[str, Any], field: str, where: str) -> dict[str, Any]:
    value = content.get(field, {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected {field} as an object, got {_shown(value)}")
    return value


def _axes(each: Any, where: str) -> tuple[Axis, ...]:
    if not isinstance(each, list):
        raise InputError(f"{where}: expected a list with an entry for each dimension, got {_shown(each)}")
    return tuple(_axis(entry, where) for entry in each)


def _axis(entry: Any, where: str) -> Axis:
    if entry is None:
        return ()
    runs = [RUN.fullmatch(part.strip()) for part in entry.split("+")] if isinstance(entry, str) else [None]
    if not all(runs):
        raise InputError(f'{where}: expected "name", "name * 2", "name + name" or null, got {_shown(entry)}')
    return tuple(Run(run[1], int(run[2] or 1)) for run in runs if run)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and RUN.fullmatch(value) is not None and "*" not in value
