"""The harness: types, contracts, runner, records and boards."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

if __name__ != "shiftproof.benchmark":
    raise ImportError("import this package as 'shiftproof.benchmark'")

if TYPE_CHECKING:
    from shiftproof.benchmark.context import RunContext as RunContext
    from shiftproof.benchmark.contracts import (
        BackboneSpec as BackboneSpec,
        ExecutorSpec as ExecutorSpec,
        MetricSpec as MetricSpec,
        StrategySpec as StrategySpec,
        StreamSpec as StreamSpec,
        SuiteSpec as SuiteSpec,
    )
    from shiftproof.benchmark.errors import InputError as InputError
    from shiftproof.benchmark.evaluation import evaluating as evaluating
    from shiftproof.benchmark.experiences import (
        ArrayData as ArrayData,
        Batch as Batch,
        DataExperience as DataExperience,
        EvalSet as EvalSet,
        ExpertExperience as ExpertExperience,
        GroupedExperience as GroupedExperience,
        JointExperience as JointExperience,
        TransportExperience as TransportExperience,
        as_float as as_float,
    )
    from shiftproof.benchmark.hookspecs import hookimpl as hookimpl
    from shiftproof.benchmark.models import Model as Model
    from shiftproof.benchmark.recipes import BaseRecipe as BaseRecipe, Recipe as Recipe
    from shiftproof.benchmark.streams import (
        Fold as Fold,
        Scenario as Scenario,
        Stream as Stream,
        leave_one_domain_out as leave_one_domain_out,
        offline as offline,
        sequential as sequential,
    )

# Resolved on first use (PEP 562), so that naming one does not import the others.
_HOME = {
    "RunContext": "context",
    "BackboneSpec": "contracts",
    "ExecutorSpec": "contracts",
    "MetricSpec": "contracts",
    "StrategySpec": "contracts",
    "StreamSpec": "contracts",
    "SuiteSpec": "contracts",
    "InputError": "errors",
    "evaluating": "evaluation",
    "ArrayData": "experiences",
    "Batch": "experiences",
    "DataExperience": "experiences",
    "EvalSet": "experiences",
    "ExpertExperience": "experiences",
    "GroupedExperience": "experiences",
    "JointExperience": "experiences",
    "TransportExperience": "experiences",
    "as_float": "experiences",
    "hookimpl": "hookspecs",
    "Model": "models",
    "BaseRecipe": "recipes",
    "Recipe": "recipes",
    "Fold": "streams",
    "Scenario": "streams",
    "Stream": "streams",
    "leave_one_domain_out": "streams",
    "offline": "streams",
    "sequential": "streams",
}

__all__ = [
    "ArrayData",
    "BackboneSpec",
    "BaseRecipe",
    "Batch",
    "DataExperience",
    "EvalSet",
    "ExecutorSpec",
    "ExpertExperience",
    "Fold",
    "GroupedExperience",
    "InputError",
    "JointExperience",
    "MetricSpec",
    "Model",
    "Recipe",
    "RunContext",
    "Scenario",
    "StrategySpec",
    "Stream",
    "StreamSpec",
    "SuiteSpec",
    "TransportExperience",
    "as_float",
    "evaluating",
    "hookimpl",
    "leave_one_domain_out",
    "offline",
    "sequential",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
