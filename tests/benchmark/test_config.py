"""Knobs from text, their descriptions, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Lt
from hypothesis import given, settings, strategies as st
from pydantic import Field as PydanticField

from shiftproof.benchmark.config import describe, resolve, show_value, split_overrides, type_text
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.recipes import Recipe


@dataclass(frozen=True)
class Knobs:
    """One field of every kind."""

    gamma: Annotated[float, Ge(0)] = 0.5  # weight of the mean loss, in [0, inf)
    bins: Annotated[int, Ge(1)] = 8
    share: Annotated[float, Gt(0), Lt(1)] = 0.3  # eq. (4) # not 1
    kind: Literal["kmeans", "none"] = "kmeans"
    order: Literal[1, 2] = 1
    verbose: bool = False
    name: str = "#1"
    limit: int | None = None
    rate: float | Literal["auto"] = "auto"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, str] = (0.5, "a")
    made: tuple[int, ...] = field(default_factory=tuple)
    parts: tuple[float | None, ...] = (None, 1.0)


@dataclass(frozen=True)
class More(Knobs):
    bins: Annotated[int, Ge(1)] = 16  # more of them
    extra: int = 0  # of its own


@dataclass(frozen=True)
class Checked:
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"expected low <= high, got {self.low} > {self.high}")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("gamma", "1e-3", 0.001),
        ("gamma", "2", 2.0),
        ("bins", "16", 16),
        ("kind", "none", "none"),
        ("order", "2", 2),
        ("verbose", "true", True),
        ("verbose", "0", False),
        ("name", "a=b,c", "a=b,c"),
        ("name", "none", "none"),
        ("name", "12", "12"),
        ("limit", "3", 3),
        ("limit", "9223372036854775807", 2**63 - 1),
        ("limit", "none", None),
        ("rate", "0.1", 0.1),
        ("rate", "auto", "auto"),
        ("sizes", "3", (3,)),
        ("sizes", "3, 4,5", (3, 4, 5)),
        ("sizes", "", ()),
        ("pair", "1,b", (1.0, "b")),
        ("parts", "none,2", (None, 2.0)),
    ],
)
def test_a_knob_is_read_from_text(key: str, text: str, value: Any) -> None:
    read = getattr(resolve(Knobs(), [(key, text)]), key)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("gamma", "much", "gamma: expected float >= 0, got 'much'"),
        ("gamma", "-1", "gamma: expected float >= 0, got '-1'"),
        ("gamma", "nan", "gamma: expected finite float >= 0, got 'nan'"),
        ("gamma", "inf", "gamma: expected finite float >= 0, got 'inf'"),
        ("gamma", "1e999", "gamma: expected finite float >= 0, got '1e999'"),
        ("kind", "inf", "kind: expected kmeans | none, got 'inf'"),
        ("bins", "0", "bins: expected int >= 1, got '0'"),
        ("bins", "2.5", "bins: expected int >= 1, got '2.5'"),
        ("bins", "", "bins: expected int >= 1, got ''"),
        ("bins", "9223372036854775808", "bins: expected int >= 1 of 64 bits, got '9223372036854775808'"),
        ("limit", "-9223372036854775809", "limit: expected int | none of 64 bits, got '-9223372036854775809'"),
        ("share", "1", "share: expected float > 0 < 1, got '1'"),
        ("kind", "gmm", "kind: expected kmeans | none, got 'gmm'"),
        ("order", "3", "order: expected 1 | 2, got '3'"),
        ("verbose", "maybe", "verbose: expected bool, got 'maybe'"),
        ("limit", "few", "limit: expected int | none, got 'few'"),
        ("rate", "slow", "rate: expected float | auto, got 'slow'"),
        ("sizes", "1,x", "sizes: expected int,..., got '1,x'"),
        ("pair", "1", "pair: expected float,str, got '1'"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_says_what_was_expected(key: str, text: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(Knobs(), [(key, text)])
    assert str(error.value).startswith(expected)


def test_an_error_says_whose_knob_it_is_and_what_it_is_unset() -> None:
    with pytest.raises(InputError, match=r"^lws.bins: expected int >= 1, got 'x'; unset it is 8$"):
        resolve(Knobs(), [("bins", "x")], "lws")


def test_an_unknown_knob_lists_the_fields_and_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"a knob of lws, got 'gama'; did you mean 'gamma'\? \(known: gamma, bins, share"):
        resolve(Knobs(), [("gama", "1")], "lws")


def test_later_pairs_win_and_untouched_knobs_keep_the_values_of_a_preset() -> None:
    preset = Knobs(bins=3)
    assert resolve(preset, [("gamma", "1"), ("gamma", "2")]) == Knobs(bins=3, gamma=2.0)


def test_a_config_may_refuse_a_combination_by_itself() -> None:
    with pytest.raises(InputError, match="expected low <= high, got 5 > 1"):
        resolve(Checked(), [("low", "5")])
    assert resolve(Checked(), [("low", "5"), ("high", "6")]) == Checked(5, 6)


@settings(database=None, derandomize=True, deadline=None)
@given(
    st.builds(
        Knobs,
        gamma=st.floats(0, allow_infinity=False),
        bins=st.integers(1),
        share=st.floats(0.01, 0.99),
        kind=st.sampled_from(["kmeans", "none"]),
        order=st.sampled_from([1, 2]),
        verbose=st.booleans(),
        name=st.text(),
        limit=st.none() | st.integers(),
        rate=st.floats(allow_nan=False, allow_infinity=False) | st.just("auto"),
        sizes=st.lists(st.integers()).map(tuple),
        pair=st.tuples(st.floats(-9, 9), st.text("abc", min_size=1)),
        parts=st.lists(st.none() | st.floats(-9, 9)).map(tuple),
    )
)
def test_what_is_shown_reads_back_to_the_same_value(knobs: Knobs) -> None:
    pairs = [(name, show_value(value)) for name, value in vars(knobs).items()]
    assert resolve(Knobs(), pairs) == knobs


def test_a_knob_is_described_by_type_default_and_the_comment_behind_it() -> None:
    described = {knob.name: (knob.type, knob.default, knob.comment) for knob in describe(Knobs)}
    assert described["gamma"] == ("float >= 0", "0.5", "weight of the mean loss, in [0, inf)")
    assert described["share"] == ("float > 0 < 1", "0.3", "eq. (4) # not 1")
    assert described["name"] == ("str", "#1", "")
    assert described["rate"] == ("float | auto", "auto", "")
    assert described["parts"] == ("float | none,...", "none,1.0", "")
    assert described["made"] == ("int,...", "", "")
    assert list(described) == list(vars(Knobs()))


def test_inherited_knobs_keep_their_comments_and_a_child_may_replace_one() -> None:
    comments = {knob.name: knob.comment for knob in describe(More)}
    assert (comments["gamma"], comments["bins"], comments["extra"]) == (
        "weight of the mean loss, in [0, inf)",
        "more of them",
        "of its own",
    )


def test_a_config_without_source_is_described_without_comments() -> None:
    made = make_dataclass("Made", [("x", int, 1)], frozen=True)
    assert [(knob.name, knob.default, knob.comment) for knob in describe(made)] == [("x", "1", "")]


def test_the_recipe_of_every_stream_can_be_described() -> None:
    assert {"epochs": "per experience", "momentum": "of sgd"}.items() <= {k.name: k.comment for k in describe(Recipe)}.items()


def test_ranges_of_pydantic_are_described_like_those_of_annotated_types() -> None:
    assert type_text(Annotated[int, PydanticField(ge=1)]) == type_text(Annotated[int, Ge(1)]) == "int >= 1"


OWNERS = {"lws": ["gamma", "bins"], "bpa": ["clusters", "gamma"], "stream": ["p_corr"], "recipe": ["epochs", "lr"]}


def test_scoped_overrides_go_to_their_owner_and_a_bare_key_to_its_only_one() -> None:
    items = ["lws.gamma=0.5", "stream.p_corr=0.9", "recipe.epochs=4", "epochs=4", "clusters=a=b"]
    assert split_overrides(items, OWNERS) == {
        "lws": [("gamma", "0.5")],
        "bpa": [("clusters", "a=b")],
        "stream": [("p_corr", "0.9")],
        "recipe": [("epochs", "4"), ("epochs", "4")],
    }


def test_a_bare_key_with_several_owners_lists_them_and_how_to_write_it() -> None:
    with pytest.raises(InputError, match=r"'gamma', got 2: bpa, lws; write bpa.gamma=1 or lws.gamma=1"):
        split_overrides(["gamma=1"], OWNERS)


@pytest.mark.parametrize("again", ["lws.bins=2", "bins=2"])
def test_a_knob_has_one_value_however_it_is_spelled(again: str) -> None:
    with pytest.raises(InputError, match=rf"expected one value for {again[:-2]}, got two: 1 and 2; leave one out"):
        split_overrides(["lws.bins=1", again], OWNERS)


def test_a_preset_may_differ_from_what_its_strategy_is_given() -> None:
    owners = {"lws": ["gamma"], "lws@released": ["gamma"]}
    pairs = split_overrides(["lws.gamma=1", "lws@released.gamma=2"], owners)
    assert pairs == {"lws": [("gamma", "1")], "lws@released": [("gamma", "1"), ("gamma", "2")]}


def test_a_strategy_with_several_presets_is_one_owner() -> None:
    owners = {"lws": ["gamma"], "lws@released": ["gamma"], "stream": ["p_corr"]}
    both = {"lws": [("gamma", "1")], "lws@released": [("gamma", "1")], "stream": []}
    assert split_overrides(["gamma=1"], owners) == split_overrides(["lws.gamma=1"], owners) == both
    assert split_overrides(["lws@released.gamma=1"], owners) == both | {"lws": []}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("gamma", "expected an override like SCOPE.KEY=VALUE, got 'gamma'"),
        ("=1", "expected an override like SCOPE.KEY=VALUE, got '=1'"),
        ("lws.=1", "expected an override like SCOPE.KEY=VALUE"),
        ("lsw.gamma=1", "a scope before .gamma=1, got 'lsw'; did you mean 'lws'? (known: bpa, lws, recipe, stream)"),
        ("lws.clusters=1", "a knob of lws, got 'clusters' (known: gamma, bins)"),
        ("recipe.epoch=1", "a knob of recipe, got 'epoch'; did you mean 'epochs'?"),
        ("epoch=1", "a knob of this run, got 'epoch'; did you mean 'epochs'?"),
    ],
)
def test_an_override_that_belongs_to_nobody_is_an_error(item: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        split_overrides([item], OWNERS)
    assert message in str(error.value)
