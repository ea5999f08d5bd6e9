"""From what a stream yields to what a strategy consumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from shiftproof.benchmark.context import RunContext
from shiftproof.benchmark.contracts import EXPERT_TRAINER as EXPERT_TRAINER, StrategySpec
from shiftproof.benchmark.experiences import (
    DataExperience,
    Experience,
    ExpertExperience,
    GroupedExperience,
    JointExperience,
    StateDict,
    TransportExperience,
    state_sha256,
)
from shiftproof.benchmark.inventory import EXPERT
from shiftproof.benchmark.models import HEADS, Model
from shiftproof.benchmark.records import PROTOCOL_VERSION
from shiftproof.benchmark.streams import Fold, Stream


def obstacle(spec: StrategySpec[Any], stream: Stream) -> str:
    """Why a strategy cannot learn a stream; empty if it can."""
    if spec.unavailable:
        return spec.unavailable
    if stream.release is not None and spec.consumes is not TransportExperience:
        return "the stream carries a fine-tuning to a new release"
    found = {type(experience) for fold in stream.folds for experience in fold.train}
    if issubclass(spec.consumes, DataExperience):
        if not all(issubclass(kind, DataExperience) for kind in found):
            return "learns from data, the stream has none"
        if spec.uses_group_labels and not all(issubclass(kind, GroupedExperience) for kind in found):
            return "needs group labels, the stream has none"
        if spec.uses_group_labels and issubclass(spec.consumes, JointExperience):
            return "needs group labels, the union of a stream's experiences has none"
        return ""
    if is_lifted(spec, stream) or all(issubclass(kind, spec.consumes) for kind in found):
        return ""
    if spec.consumes is TransportExperience:
        return "carries a fine-tuning to a new release, the stream has none"
    return f"consumes {spec.consumes.__name__}, the stream yields {', '.join(sorted(kind.__name__ for kind in found))}"


def is_lifted(spec: StrategySpec[Any], stream: Stream) -> bool:
    """True where the strategy consumes experts, or the stream's kind of them, and the stream has data to fine-tune them on.

    A union of tasks gives no expert of one.
    """
    kinds = [type(experience) for fold in stream.folds for experience in fold.train]
    wanted = ExpertExperience if stream.release is None else TransportExperience
    lifted = all(issubclass(kind, DataExperience) and not issubclass(kind, JointExperience) for kind in kinds)
    return spec.consumes is wanted and lifted


def lift(spec: StrategySpec[Any], fold: Fold) -> tuple[Experience, ...]:
    """The fold's experiences as the strategy may see them: one union for `joint`, without groups or data unless declared.

    What a strategy that consumes experts is given as data here is what its experts are fine-tuned on.
    """
    if issubclass(spec.consumes, JointExperience):
        return (fold.joint(),)
    if spec.uses_target and fold.target is not None:
        return (_ungrouped(spec, fold.target),)
    return tuple(_visible(spec, experience) for experience in fold.train)


def expert_key(
    base: Model, experience: DataExperience, stream: Stream, code_sha256: str, context: RunContext
) -> dict[str, Any]:
    """What determines an expert: its key in the cache.

    It depends on base, data, recipe, seed and name of the experience, not on its position or its fold.
    """
    return {
        "base": state_sha256(base.state_dict()),
        "data": experience.train.sha256(),
        "name": experience.name,
        "task": experience.task,
        "recipe": {name: value for name, value in asdict(stream.recipe).items() if name != "name"},
        "frozen_heads": stream.frozen_heads,
        "seed": context.seed,
        "trainer": code_sha256,
        "device": context.device.type,
        "torch": torch.__version__,
        "protocol": PROTOCOL_VERSION,
    }


def expert_facts(
    experience: DataExperience, stream: Stream, key: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """What an expert in the cache says about itself: whose it was first, and the key in clear."""
    told = {"stream": stream.name, "version": stream.version, "set": [], **origin}
    return {**told, "experience": experience.name, "seed": key["seed"], "key": dict(key)}


def expert_for(
    experience: DataExperience,
    fold: Fold,
    stream: Stream,
    trainer: StrategySpec[Any],
    code_sha256: str,
    context: RunContext,
    origin: Mapping[str, Any] | None = None,
) -> ExpertExperience:
    """The base fine-tuned on one experience with the stream's recipe, out of the cache where it was fine-tuned before.

    Args:
        trainer: The strategy that fine-tunes.
        code_sha256: Hash of its code.
        origin: What the entry in the cache says of the run, beside the facts that are known here.
    """
    base = context.new_model()
    alone = DataExperience(0, experience.name, experience.task, experience.train)
    key = expert_key(base, experience, stream, code_sha256, context)
    child = context.child(f"expert/{experience.name}")

    def make() -> StateDict:
        strategy = trainer.build(trainer.config(), child)
        with child.global_rng("expert"):
            strategy.learn(alone)
        return strategy.model().state_dict()

    made = context.cache.made[EXPERT]
    weights = context.cache.tensors(EXPERT, key, make, expert_facts(experience, stream, key, origin or {}))
    if context.cache.made[EXPERT] > made:
        context.cost.experts_trained += 1
        context.cost.optimizer_steps += child.cost.optimizer_steps
        context.cost.samples_seen += child.cost.samples_seen
    else:
        context.cost.experts_reused += 1
    expert = context.new_model()
    expert.load_state_dict(weights)
    shared = shared_names(base, [one.task for one in fold.train])
    return ExpertExperience(
        experience.index, experience.name, experience.task, base, expert, shared, experience, stream.base.has_head
    )


def carried_to(release: Model, expert: ExpertExperience) -> TransportExperience:
    """The same expert, and the release that it should go to.

    Shared is what both releases have of their own: the backbone, and the head of task 0 where they bring one.
    """
    own = f"{HEADS}0."
    shared = {
        name
        for name in release.state_dict()
        if not name.startswith(HEADS) or (expert.has_zero_shot_head and name.startswith(own))
    }
    facts = {field.name: getattr(expert, field.name) for field in fields(ExpertExperience)}
    return TransportExperience(**{**facts, "shared": frozenset(shared)}, target_base=release)


def shared_names(model: Model, tasks: Sequence[int]) -> frozenset[str]:
    """What all experts have in common: the backbone, and the head where all experiences have one task id."""
    names = {name for name in model.state_dict() if not name.startswith(HEADS)}
    return frozenset(names | model.head_keys(tasks[0]) if len(set(tasks)) == 1 and len(tasks) > 1 else names)


def visible_expert(spec: StrategySpec[Any], config: Any, experience: Experience) -> Experience:
    """An expert as the strategy may see it: without its data unless it declares that it needs them."""
    if isinstance(experience, DataExperience) or needs_data(spec, config):
        return experience
    return replace(experience, data=None)


def needs_data(spec: StrategySpec[Any], config: Any) -> bool:
    """Whether a strategy with this config looks at data."""
    return spec.needs_data or bool(spec.data_knob and getattr(config, spec.data_knob))


def _visible(spec: StrategySpec[Any], experience: Experience) -> Experience:
    if isinstance(experience, DataExperience):
        return _ungrouped(spec, experience)
    if experience.data is None:
        return experience
    return replace(experience, data=_ungrouped(spec, experience.data) if spec.needs_data or spec.data_knob else None)


def _ungrouped(spec: StrategySpec[Any], experience: DataExperience) -> DataExperience:
    if isinstance(experience, GroupedExperience) and not spec.uses_group_labels:
        return experience.without_groups()
    return experience
