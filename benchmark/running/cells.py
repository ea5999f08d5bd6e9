"""Cells: a request with everything it names looked up, and the identity of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shiftproof.benchmark import codehash, config, lifting
from shiftproof.benchmark.contracts import StrategySpec
from shiftproof.benchmark.recipes import BaseRecipe
from shiftproof.benchmark.records import PROTOCOL_VERSION, SCHEMA_VERSION, RunRequest, sha256
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.streams import Stream


@dataclass(frozen=True, eq=False)
class Cell:
    """A request with everything it names looked up, and its identity."""

    request: RunRequest
    spec: StrategySpec[Any]
    config: Any
    stream: Stream
    identity: dict[str, Any]
    run_id: str


def build_stream(registry: Registry, request: RunRequest, data_root: str | None = None) -> Stream:
    """The stream with the request's knobs, recipe and base."""
    spec = registry.stream(request.stream)
    stream = spec.build(config.resolve(spec.config(), request.knobs, spec.name), data_root)
    recipe = config.resolve(stream.recipe, request.recipe, "recipe")
    if request.recipe_name:
        recipe = replace(recipe, name=request.recipe_name)
    base = config.resolve(stream.base, request.base, "base")
    # A release of another architecture would be no release: it follows the base's. The rest of its recipe is the stream's.
    release = stream.release and replace(stream.release, backbone=base.backbone)
    module = codehash.module_of(registry.backbone(base.backbone).build)
    return replace(stream, recipe=recipe, base=base, release=release, backbone_sha256=codehash.plugin_sha256(module))


def make_cell(registry: Registry, request: RunRequest, stream: Stream, device: str = "cpu") -> Cell:
    """Look up the strategy and take the identity of the run.

    Raises:
        InputError: If a name or a knob is unknown or out of range.
    """
    spec, _, preset = registry.strategy(request.label)
    resolved = config.resolve(preset, request.config, request.label)
    stream_config = config.resolve(registry.stream(request.stream).config(), request.knobs, request.stream)
    return identify(request, spec, resolved, stream, asdict(stream_config), device, experts_of(registry, spec, stream))


def experts_of(registry: Registry, spec: StrategySpec[Any], stream: Stream) -> dict[str, str]:
    """Who fine-tunes the experts and the hash of its code; empty where the stream is not lifted to experts."""
    if not lifting.is_lifted(spec, stream):
        return {}
    trainer, _, _ = registry.strategy(lifting.EXPERT_TRAINER)
    return {"strategy": trainer.name, "code_sha256": _code_sha256(trainer)}


def obstacle(registry: Registry, spec: StrategySpec[Any], stream: Stream) -> str:
    """Why a strategy cannot learn a stream here, with what is loaded; empty if it can."""
    reason = lifting.obstacle(spec, stream)
    if not reason and lifting.is_lifted(spec, stream) and lifting.EXPERT_TRAINER not in registry.strategies:
        return f"needs the strategy {lifting.EXPERT_TRAINER!r} to fine-tune experts, which is not loaded"
    return reason


def origin_of(request: RunRequest, stream: Stream) -> dict[str, Any]:
    """What a file says of the stream that it was made for: name, version, and what was set, without a path."""
    scopes = {"stream": request.knobs, "recipe": request.recipe, "base": request.base}
    pairs = [(f"{scope}.{key}", value) for scope, found in scopes.items() for key, value in found]
    told = [f"{key}={Path(value).name if key == 'base.file' else value}" for key, value in pairs]
    return {"stream": request.stream, "version": stream.version, "set": told}


def identify(
    request: RunRequest,
    spec: StrategySpec[Any],
    resolved: Any,
    stream: Stream,
    knobs: Mapping[str, Any],
    device: str,
    experts: Mapping[str, str] | None = None,
) -> Cell:
    """A cell from its parts. The run id is the hash of what determines the result.

    Args:
        experts: What `experts_of` gives.
    """
    identity = {
        "schema": SCHEMA_VERSION,
        "strategy": spec.name,
        "config": asdict(resolved),
        "code_sha256": _code_sha256(spec),
        "stream": stream.name,
        "stream_version": stream.version,
        "knobs": dict(knobs),
        "split_sha256": stream.split_sha256,
        "data_sha256": stream.data_sha256,
        "fold": request.fold,
        "seed": request.seed,
        "recipe": asdict(stream.recipe),
        "base": _base(stream.base, stream.base_sha256),
        "device": torch.device(device).type,
        "dtype": stream.recipe.precision,
        "protocol_version": PROTOCOL_VERSION,
        **({"experts": dict(experts)} if experts else {}),
        **({"frozen_heads": True} if stream.frozen_heads else {}),
        **({"release": _base(stream.release, stream.release_sha256)} if stream.release else {}),
    }
    return Cell(request, spec, resolved, stream, identity, sha256(identity))


def _base(recipe: BaseRecipe, identity: str) -> dict[str, Any]:
    return {**asdict(recipe), "file": Path(recipe.file).name, "sha256": identity}


def _code_sha256(spec: StrategySpec[Any]) -> str:
    return codehash.code_sha256(codehash.module_of(spec.build), spec.config.__module__)
