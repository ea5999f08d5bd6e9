"""Base and new release of a cell's stream: made or out of the cache, with the hashes and the time that the record needs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import ArrayData, StateDict, tensor_bytes
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.pretraining import base_weights, read_base
from shiftproof.benchmark.recipes import BaseRecipe
from shiftproof.benchmark.records import sha256
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.streams import Stream


class Bases:
    """Base and release of one cell.

    Attributes:
        base_sha256: Of the base's weights; empty before they were asked for.
        release_sha256: Of the release's.
        seconds: How long making them took, which is no cell's own time since all share them.
    """

    def __init__(self, stream: Stream, registry: Registry, cache: Cache, device: torch.device) -> None:
        self.stream = stream
        self.registry = registry
        self.cache = cache
        self.device = device
        self.base_sha256 = self.release_sha256 = ""
        self.seconds = 0.0

    def base(self) -> tuple[Model, StateDict]:
        """A new model with the stream's heads, and the weights that it should take over."""
        weights = self.base_weights()
        self.base_sha256 = _sha256_of_each(weights)
        return self.untrained(), weights

    def untrained(self) -> Model:
        """The architecture with the stream's heads, its weights drawn from torch's global generator."""
        stream = self.stream
        model = Model(self.registry.backbone(stream.base.backbone).build(stream.input_shape), stream.heads)
        model.heads.requires_grad_(not stream.frozen_heads)
        return model

    def base_weights(self) -> StateDict:
        """The base's weights alone: the backbone's, and those of the head that it brings."""
        stream = self.stream
        return self._weights(stream.base, stream.unlabelled(), stream.base_sha256, stream.base_data)

    def release(self, model: Model) -> Model:
        """The model with the backbone of the new release and the head that it brings.

        Args:
            model: A copy of the base's, which is changed; heads that the release does not bring stay.

        Raises:
            InputError: If the stream has no new release.
        """
        weights = self.release_weights()
        self.release_sha256 = _sha256_of_each(weights)
        model.load_base(weights)
        return model

    def release_weights(self) -> StateDict:
        """The release's weights alone. Raises InputError if the stream has no new release."""
        stream = self.stream
        if stream.release is None:
            raise InputError(f"expected a stream with a new release of its base, got {stream.name}; choose one that has it")
        return self._weights(stream.release, stream.unlabelled_release(), stream.release_sha256, stream.release_data)

    def _weights(self, recipe: BaseRecipe, inputs: Sequence[Tensor], identity: str, labelled: ArrayData | None) -> StateDict:
        before = time.monotonic()
        build, shape = self.registry.backbone(recipe.backbone).build, self.stream.input_shape
        weights = base_weights(recipe, lambda: build(shape), inputs, self.cache, identity, self.device, labelled)
        self.seconds += time.monotonic() - before
        return weights


def check_base_file(registry: Registry, stream: Stream) -> None:
    """A file that is not there or does not fit is wrong input, once, and not the failure of every cell.

    Raises:
        InputError: If the stream's base comes from such a file, or names one that it would not read.
    """
    if stream.base.kind != "file":
        if stream.base.file:
            kind, file = stream.base.kind, stream.base.file
            raise InputError(
                f"{stream.name}: expected no base.file where base.kind is {kind}, got {file!r}; "
                "add --set base.kind=file to take the weights from it"
            )
        return
    if not Path(stream.base.file).is_file():
        raise InputError(
            f"{stream.name}: expected the base's weights in a safetensors file, got {stream.base.file!r}, which is not there; "
            "name it with --set base.file=PATH"
        )
    build = registry.backbone(stream.base.backbone).build
    read_base(Path(stream.base.file), build(stream.input_shape))


def _sha256_of_each(weights: StateDict) -> str:
    return sha256({name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in sorted(weights.items())})
