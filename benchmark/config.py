"""Knobs from text: "gamma=0.5" to a frozen dataclass, with errors that list what there is."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import math
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.names import did_you_mean

C = TypeVar("C")
Pairs = list[tuple[str, str]]

_SYMBOLS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of", "min_length": "length >="}


@dataclass(frozen=True)
class Field:
    """One knob, as text: what `shiftproof show` prints.

    Attributes:
        type: Type and range, such as "float >= 0 < 1" or "kmeans | gmm".
        default: As it may be written after `--set KEY=`.
        comment: The one-line comment behind the field in the source, empty if there is none.
    """

    name: str
    type: str
    default: str
    comment: str


def resolve(config: C, pairs: Iterable[tuple[str, str]], owner: str = "") -> C:
    """A copy of `config` with knobs set from text.

    Numbers, booleans, strings and literals are written as in Python, tuples as "1,2", None as "none".

    Args:
        config: An instance of a dataclass; its fields may be `Annotated` with ranges of `annotated_types`.
        pairs: (field, value) texts; later ones win.
        owner: Whose knobs these are, for the error message.

    Raises:
        InputError: If a field is unknown, a value has the wrong type or is out of range, or the dataclass itself refuses.
    """
    hints = _hints(type(config))
    prefix = f"{owner}." if owner else ""
    changes = {}
    for key, text in pairs:
        if key not in hints:
            raise InputError(_unknown_knob(key, hints, owner))
        try:
            changes[key] = _parse(hints[key], text)
        except ValueError as error:
            now = show_value(getattr(config, key))
            wanted = type_text(hints[key])
            wanted = f"finite {wanted}" if "float" in wanted and _is_infinite(text) else wanted
            wanted = f"{wanted} of 64 bits" if "int" in wanted and _is_huge(text) else wanted
            raise InputError(f"{prefix}{key}: expected {wanted}, got {text!r}; unset it is {now}") from error
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise InputError(f"{prefix or type(config).__name__ + ' '}{' '.join(str(error).split())}") from error


def check_type(config_type: type[Any]) -> None:
    """Refuse a config that the command line could not set.

    Raises:
        InputError: Unless it is a frozen dataclass with a default for every field, each of them within its own range and
            of a type that survives being written as text and read back.
    """
    name = getattr(config_type, "__name__", str(config_type))
    parameters = getattr(config_type, "__dataclass_params__", None)
    if not isinstance(config_type, type) or parameters is None or not parameters.frozen:
        raise InputError(f"expected the config to be a frozen dataclass, got {name}; write @dataclass(frozen=True) above it")
    bare = [field.name for field in dataclasses.fields(config_type) if not _has_default(field)]
    if bare:
        raise InputError(f"expected a default for every field of {name}, got none for {', '.join(bare)}")
    check_values(config_type())


def check_values(config: Any) -> None:
    """Refuse an instance, such as a preset, whose values break the types or ranges of its own fields.

    Raises:
        InputError: Naming the first such field.
    """
    for field, hint in _hints(type(config)).items():
        value = getattr(config, field)
        where = f"{type(config).__name__}.{field}"
        try:
            again = _parse(hint, show_value(value))
        except ValueError as error:
            raise InputError(f"{where}: expected {type_text(hint)}, got {value!r}") from error
        if again != value:
            allowed = "a number, string, boolean, literal, None or tuple of them"
            raise InputError(f"{where}: expected {allowed}, got {value!r} of type {type_text(hint)}")


def describe(config_type: type[Any]) -> list[Field]:
    """Every knob of a config, in the order of its source."""
    hints, comments = _hints(config_type), _comments(config_type)
    return [
        Field(field.name, type_text(hints[field.name]), show_value(_default(field)), comments.get(field.name, ""))
        for field in dataclasses.fields(config_type)
    ]


def split_overrides(items: Iterable[str], owners: Mapping[str, Iterable[str]]) -> dict[str, Pairs]:
    """Sort "SCOPE.KEY=VALUE" by whose knob it is.

    Args:
        items: Overrides. A key without scope is allowed where one owner alone has it.
        owners: Field names of every scope of a run: its strategies, "stream", "recipe", "base". A strategy that takes part
            with several presets is there as "lws" and "lws@released"; the scope "lws" then reaches both.

    Returns:
        For every owner its (key, value) pairs, in the order they were given.

    Raises:
        InputError: If an override is not of that form, its scope or key is unknown, several owners have the bare key, or one
            knob is given two values: which of them was meant, nobody can tell.
    """
    fields = {owner: list(names) for owner, names in owners.items()}
    sorted_pairs: dict[str, Pairs] = {owner: [] for owner in fields}
    given: dict[tuple[tuple[str, ...], str], str] = {}
    for item in items:
        target, equals, value = item.partition("=")
        scope, dot, key = target.rpartition(".")
        if not equals or not key:
            raise InputError(f"expected an override like SCOPE.KEY=VALUE, got {item!r}; write for example recipe.epochs=4")
        reached = _reached(scope, key, value, fields) if dot else _only_owner(key, value, fields)
        before = given.setdefault((tuple(reached), key), value)
        if before != value:
            raise InputError(f"expected one value for {target}, got two: {before} and {value}; leave one out")
        for owner in reached:
            sorted_pairs[owner].append((key, value))
    return sorted_pairs


def show_value(value: Any) -> str:
    """A value as it may be written after `KEY=`.

    >>> show_value((0.5, None)), show_value(True), show_value("kmeans")
    ('0.5,none', 'true', 'kmeans')
    """
    if isinstance(value, tuple | list):
        return ",".join(show_value(item) for item in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def type_text(hint: Any) -> str:
    """A type annotation in a user's words.

    >>> from annotated_types import Ge
    >>> type_text(typing.Annotated[int, Ge(1)] | None), type_text(tuple[float, float])
    ('int >= 1 | none', 'float,float')
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return " ".join([type_text(arguments[0]), *_ranges(arguments[1:])])
    if origin is Literal:
        return " | ".join(show_value(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin is tuple:
        return ",".join("..." if argument is Ellipsis else type_text(argument) for argument in arguments)
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _ranges(metadata: Sequence[Any]) -> list[str]:
    """Bounds in words; pydantic's `Field(ge=1)` holds a list of the same objects that `annotated_types` offers."""
    flat = [bound for item in metadata for bound in getattr(item, "metadata", [item])]
    found = [(symbol, getattr(bound, name, None)) for bound in flat for name, symbol in _SYMBOLS.items()]
    return [f"{symbol} {limit}" for symbol, limit in found if limit is not None]


def _hints(config_type: type[Any]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(config_type, include_extras=True)
    except NameError as error:
        raise InputError(f"{config_type.__name__}: expected types that exist when the module runs, got {error}") from error
    return {field.name: hints[field.name] for field in dataclasses.fields(config_type)}


def _parse(hint: Any, text: str) -> Any:
    """Read `text` as `hint`, trying the spellings in which a value may be written; the first that fits wins."""
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError  # 0.05 s that `list` need not pay

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))  # a record is JSON, which has no NaN
    except PydanticUserError as error:
        raise ValueError(f"no value of {hint} can be written as text") from error
    for value in _spellings(text):
        try:
            found = adapter.validate_strings(value) if value is text else adapter.validate_python(value)
        except (ValidationError, TypeError):
            continue
        if not (isinstance(found, int) and _is_huge(str(found))):
            return found
    raise ValueError(text)


def _is_infinite(text: str) -> bool:
    """True for what is a number in Python and none in JSON: inf, nan and 1e999."""
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False


def _is_huge(text: str) -> bool:
    """True for an integer that no tensor can hold."""
    return re.fullmatch(r"-?\d+", text) is not None and (len(text) > 20 or not -(2**63) <= int(text) < 2**63)


def _spellings(text: str) -> list[Any]:
    """None, the text as it stands, a number (for literals of numbers), a tuple."""
    spellings: list[Any] = [None] if text == "none" else []
    spellings.append(text)
    if re.fullmatch(r"-?\d+(\.\d+)?", text):
        spellings.append(json.loads(text) if not re.match(r"-?0\d", text) else text)
    return [*spellings, tuple(None if part == "none" else part.strip() for part in text.split(",")) if text else ()]


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _comments(config_type: type[Any]) -> dict[str, str]:
    """The comment behind each field; those of a parent first, so that the child's win."""
    comments: dict[str, str] = {}
    for parent in reversed(config_type.__mro__):
        if dataclasses.is_dataclass(parent):
            comments |= _comments_in(parent)
    return comments


def _comments_in(config_type: type[Any]) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(config_type))
    except (OSError, TypeError):  # made at a prompt or by make_dataclass: there is no source
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    return {
        node.target.id: by_line.get(node.end_lineno or 0, "")
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _unknown_knob(key: str, known: Iterable[str], owner: str) -> str:
    names = list(known)
    whose = f"a knob of {owner}" if owner else "a knob"
    return f"expected {whose}, got {key!r}{did_you_mean(key, names)} (known: {', '.join(names) or 'none'})"


def _reached(scope: str, key: str, value: str, fields: Mapping[str, list[str]]) -> list[str]:
    """Owners that a scope names: itself, or a strategy with each of its presets."""
    reached = [owner for owner in fields if scope in (owner, owner.partition("@")[0])]
    if not reached:
        known = sorted({name for owner in fields for name in (owner, owner.partition("@")[0])})
        question = did_you_mean(scope, known)
        raise InputError(f"expected a scope before .{key}={value}, got {scope!r}{question} (known: {', '.join(known)})")
    for owner in reached:
        if key not in fields[owner]:
            raise InputError(_unknown_knob(key, fields[owner], owner))
    return reached


def _only_owner(key: str, value: str, fields: Mapping[str, list[str]]) -> list[str]:
    owners = [owner for owner, names in fields.items() if key in names]
    scopes = sorted({owner.partition("@")[0] for owner in owners})
    if not scopes:
        known = sorted({name for names in fields.values() for name in names})
        raise InputError(_unknown_knob(key, known, "this run"))
    if len(scopes) > 1:
        ways = " or ".join(f"{scope}.{key}={value}" for scope in scopes)
        raise InputError(f"expected one owner of the knob {key!r}, got {len(scopes)}: {', '.join(scopes)}; write {ways}")
    return owners
