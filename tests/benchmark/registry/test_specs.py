"""Specs that a plugin must not be able to register."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass, replace
from typing import Annotated, Any

import pytest
from annotated_types import Ge

from shiftproof.benchmark.contracts import BackboneSpec, ExecutorSpec, MetricSpec, StrategySpec, StreamSpec, SuiteSpec
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import DataExperience, ExpertExperience, GroupedExperience, JointExperience
from shiftproof.benchmark.registry.specs import check_spec


@dataclass(frozen=True)
class Config:
    gamma: Annotated[float, Ge(0)] = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Other:
    gamma: float = 0.5


@dataclass
class Thawed:
    gamma: float = 0.5


@dataclass(frozen=True)
class WithoutDefault:
    gamma: float


@dataclass(frozen=True)
class OutOfRange:
    gamma: Annotated[float, Ge(0)] = -1.0


@dataclass(frozen=True)
class Unwritable:
    table: dict[str, int] = None  # type: ignore[assignment]


MANY: Any = "many"


def build(*arguments: Any) -> Any:
    return arguments


STRATEGY = StrategySpec("toy", build, Config, DataExperience, "Toy et al.", {"released": Config(2.0)})
STREAM = StreamSpec("toy", build, Config, "digits", "a stream", "Toy et al.", "CC BY 4.0")
SUITE = SuiteSpec("toy", "a suite", ("b-digits",), ("sgd",))
METRIC = MetricSpec("toy", build, True, "a mean")
BACKBONE = BackboneSpec("toy", build, "a net", "Toy et al.")
EXECUTOR = ExecutorSpec("toy", build, "a way")
SOUND: dict[str, Any] = {
    "strategy": STRATEGY,
    "stream": STREAM,
    "suite": SUITE,
    "metric": METRIC,
    "backbone": BACKBONE,
    "executor": EXECUTOR,
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_spec_passes_unchanged(kind: str) -> None:
    assert check_spec(kind, SOUND[kind]) is SOUND[kind]


@pytest.mark.parametrize("kind", SOUND)
def test_a_spec_of_another_kind_is_refused(kind: str) -> None:
    other = METRIC if kind != "metric" else SUITE
    with pytest.raises(InputError, match=f"expected every {kind} as a .*Spec, got"):
        check_spec(kind, other)


@pytest.mark.parametrize("name", ["", "My-Method", "my_method", "my method", "a@b", "a.b", "a=b", "a,b", "-a", "a-", "1a", 1])
@pytest.mark.parametrize("kind", SOUND)
def test_names_are_lower_case_words_joined_by_hyphens(kind: str, name: Any) -> None:
    with pytest.raises(InputError, match="lower-case words joined by '-'"):
        check_spec(kind, replace(SOUND[kind], name=name))


@pytest.mark.parametrize("name", ["der++", "er-ace", "b-celeba1"])
def test_names_of_the_field_are_allowed(name: str) -> None:
    assert check_spec("strategy", replace(STRATEGY, name=name)).name == name


@pytest.mark.parametrize("consumes", [DataExperience, GroupedExperience, JointExperience, ExpertExperience])
def test_a_strategy_consumes_any_experience_type(consumes: type) -> None:
    assert check_spec("strategy", replace(STRATEGY, consumes=consumes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "recipe"}, "no scope of overrides"),
        ({"build": "Toy"}, "`build` to be callable, got 'Toy'"),
        ({"reference": " "}, "expected a reference in words"),
        ({"consumes": int}, "an experience type such as DataExperience"),
        ({"consumes": "DataExperience"}, "an experience type such as DataExperience"),
        ({"config": dict}, "a frozen dataclass, got dict"),
        ({"config": Thawed}, "a frozen dataclass, got Thawed"),
        ({"config": Config()}, "a frozen dataclass"),
        ({"config": WithoutDefault}, "a default for every field of WithoutDefault, got none for gamma"),
        ({"config": OutOfRange}, "OutOfRange.gamma: expected float >= 0, got -1.0"),
        ({"config": Unwritable}, "Unwritable.table: expected"),
        ({"config": make_dataclass("Late", [("x", "Missing", 1)], frozen=True)}, "types that exist when the module runs"),
        ({"presets": {"released": Other()}}, "preset 'released': expected a Config, got Other"),
        ({"presets": {"Released": Config()}}, "name of a preset in lower-case"),
        ({"presets": {"released": Config(-1.0)}}, "Config.gamma: expected float >= 0, got -1.0"),
        ({"presets": {"released": Config(sizes=MANY)}}, "Config.sizes: expected int,..., got 'many'"),
    ],
)
def test_a_malformed_strategy_is_refused_with_its_name_and_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        check_spec("strategy", replace(STRATEGY, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("stream", {"build": None}, "`build` to be callable"),
        ("stream", {"tier": "small"}, "tier 'digits' or 'full', got 'small'"),
        ("stream", {"licence": ""}, "a licence in words"),
        ("stream", {"description": ""}, "a description in words"),
        ("stream", {"config": Thawed}, "a frozen dataclass"),
        ("suite", {"streams": ()}, "at least one of streams"),
        ("suite", {"strategies": ()}, "at least one of strategies"),
        ("suite", {"seeds": ()}, "at least one of seeds"),
        ("suite", {"seeds": (0, -1)}, "integers of 0 or more, got -1"),
        ("suite", {"seeds": (True,)}, "integers of 0 or more, got True"),
        ("suite", {"seeds": (0, 0)}, "every seed once, got 0, 0"),
        ("metric", {"compute": 1}, "`compute` to be callable"),
        ("metric", {"definition": ""}, "a definition in words"),
        ("metric", {"over_folds": "median"}, "over_folds 'mean' or 'worst', got 'median'"),
        ("backbone", {"build": None}, "`build` to be callable"),
        ("backbone", {"description": ""}, "a description in words"),
        ("executor", {"build": None}, "`build` to be callable"),
        ("executor", {"description": ""}, "a description in words"),
    ],
)
def test_other_malformed_specs_are_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{kind} 'toy': ") as error:
        check_spec(kind, replace(SOUND[kind], **changes))
    assert message in str(error.value)
