"""From what a stream yields to what a strategy consumes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shiftproof.benchmark.contracts import StrategySpec
from shiftproof.benchmark.experiences import DataExperience, Experience, GroupedExperience, JointExperience
from shiftproof.benchmark.streams import Fold, Stream


def obstacle(spec: StrategySpec[Any], stream: Stream) -> str:
    """Why a strategy cannot learn a stream; empty if it can."""
    if spec.unavailable:
        return spec.unavailable
    found = {type(experience) for fold in stream.folds for experience in fold.train}
    if issubclass(spec.consumes, DataExperience):
        if not all(issubclass(kind, DataExperience) for kind in found):
            return "learns from data, the stream has none"
        if spec.uses_group_labels and not all(issubclass(kind, GroupedExperience) for kind in found):
            return "needs group labels, the stream has none"
        if spec.uses_group_labels and issubclass(spec.consumes, JointExperience):
            return "needs group labels, the union of a stream's experiences has none"
        return ""
    if all(issubclass(kind, spec.consumes) for kind in found):
        return ""
    return f"consumes {spec.consumes.__name__}, the stream yields {', '.join(sorted(kind.__name__ for kind in found))}"


def lift(spec: StrategySpec[Any], fold: Fold) -> tuple[Experience, ...]:
    """The fold's experiences as the strategy may see them: one union for `joint`, without groups or data unless declared."""
    if issubclass(spec.consumes, JointExperience):
        return (fold.joint(),)
    return tuple(_visible(spec, experience) for experience in fold.train)


def _visible(spec: StrategySpec[Any], experience: Experience) -> Experience:
    if isinstance(experience, DataExperience):
        return _ungrouped(spec, experience)
    if experience.data is None:
        return experience
    return replace(experience, data=_ungrouped(spec, experience.data) if spec.needs_data else None)


def _ungrouped(spec: StrategySpec[Any], experience: DataExperience) -> DataExperience:
    if isinstance(experience, GroupedExperience) and not spec.uses_group_labels:
        return experience.without_groups()
    return experience
