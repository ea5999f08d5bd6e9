"""Experts out of the cache into files that merge."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shiftproof.benchmark.cache import Cache, NotCachedError
from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.experiences import StateDict, state_sha256
from shiftproof.benchmark.experts.files import (
    BASE_FILE,
    HEADS_FILE,
    RELEASE_FILE,
    SUFFIX,
    Facts,
    check_out,
    new_export,
    write_part,
)
from shiftproof.benchmark.experts.making import Source, check_fine_tuned, expert_of, key_of, named_sources, onlooking
from shiftproof.benchmark.inventory import EXPERT
from shiftproof.benchmark.models import HEADS, Model
from shiftproof.benchmark.pretraining import BASE, base_key
from shiftproof.benchmark.recipes import BaseRecipe
from shiftproof.benchmark.records import RunRequest, sha256
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.cells import origin_of
from shiftproof.benchmark.running.runner import CellRun
from shiftproof.benchmark.streams import Stream

BACKBONE = "backbone."  # what a model's names begin with, and a base's do not
FILE_NAME = re.compile(r"\w[\w.+ -]*")


def export_experts(
    registry: Registry,
    request: RunRequest,
    stream: Stream,
    device: str,
    out: Path,
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Write base and experts, as they lie in the cache, into a folder: what all experts share in files that merge.

    Heads that are private to an expert go into a file of their own; with it a merged file is a whole model again. Where the
    stream has a new release of the base, it goes beside the base, and heads stay with the experts, as a transport takes them.

    Returns:
        The files, the base's first.

    Raises:
        InputError: If something is not in the cache, or cannot be told apart in files.
        OutputError: If the folder cannot be written; nothing is left of it.
    """
    check_fine_tuned(stream)
    found = named_sources(stream, request.fold)
    _check_names(stream, found)
    check_out(out, force)
    with onlooking(registry, request, stream, device, Cache(makes=False)) as run:
        shared = _shared(run, found)
        with new_export(out, force) as folder:
            export = _Export(run, shared, folder)
            for name, source in found.items():
                export.write_expert(name, source)
                progress(name)
            export.write_others()
    return [out / file for file in sorted(export.files, key=lambda file: file != BASE_FILE)]


class _Export:
    """An export in the making.

    Attributes:
        heads: What is not shared: as in the base until an expert has it for its own.
        owned: Names that an expert has for its own.
        files: Hash of the weights of each file that was written.
    """

    def __init__(self, run: CellRun, shared: frozenset[str], folder: Path) -> None:
        self.run, self.shared, self.folder = run, shared, folder
        self.stream = run.cell.stream
        self.start = plain_state(run.context.new_model())
        self.heads = {name: tensor for name, tensor in self.start.items() if name not in shared}
        self.owned: set[str] = set()
        self.files: dict[str, str] = {}

    def write_expert(self, name: str, source: Source) -> None:
        """The file of an expert; its own head is kept for later."""
        expert = expert_of(self.run, source)
        state, own = plain_state(expert.expert), own_names(expert.expert, expert.task, self.shared)
        others = {one for one in self.heads if one not in own and not torch.equal(state[one], self.start[one])}
        if clash := sorted(own & self.owned | others):
            raise InputError(
                f"expected every head to be of one expert or of all, got {clash[0]!r} of {self.stream.name}, which {name!r} "
                "and another have changed; such experts cannot be exported"
            )
        self.owned |= own
        self.heads |= {one: state[one] for one in own}
        facts = self._facts("expert", EXPERT, key_of(self.run, source), name)
        self._write(f"{name}{SUFFIX}", {one: state[one] for one in names_in_file(self.stream, self.shared, own)}, facts)

    def write_others(self) -> None:
        """Everything that is no expert's, the base at the end: it lists all files."""
        stream, bases = self.stream, self.run.bases
        kept = {name: tensor for name, tensor in self.start.items() if name not in self.owned}
        self._check_whole(stream.base, kept, bases.base_weights())
        if stream.release is not None:
            state = plain_state(self.run.release())
            release = {name: state[name] for name in self.shared}
            self._check_whole(stream.release, release, bases.release_weights())
            key = base_key_of(stream.release, stream.release_sha256, self.run.device)
            self._write(RELEASE_FILE, release, self._facts("release", BASE, key))
        elif self.heads:
            self._write(HEADS_FILE, self.heads, self._facts("heads"))
        facts = self._facts("base", BASE, base_key_of(stream.base, stream.base_sha256, self.run.device))
        base = {name: self.start[name] for name in self.shared}
        self._write(BASE_FILE, base, replace(facts, files=dict(self.files)))

    def _facts(self, part: str, kind: str = "", key: dict[str, Any] | None = None, experience: str = "") -> Facts:
        request = self.run.cell.request
        return Facts(
            part,
            **origin_of(request, self.stream),
            fold=request.fold,
            seed=request.seed,
            experience=experience,
            key=key or {},
            cache_key=sha256([kind, key]) if key else "",
        )

    def _write(self, file: str, tensors: StateDict, facts: Facts) -> None:
        self.files[file] = state_sha256(tensors)
        write_part(self.folder / file, replace(facts, weights_sha256=self.files[file]), tensors)

    def _check_whole(self, recipe: BaseRecipe, state: StateDict, weights: StateDict) -> None:
        """Another machine needs all of a learned base, and has only what is in the files."""
        entry = entry_of(recipe, state)
        if recipe.is_learned and state_sha256(entry) != state_sha256(weights):
            raise InputError(
                f"expected a base whose head is in no expert's place, got that of {self.stream.name}; "
                "its experts cannot be exported"
            )


def plain_state(model: Model) -> StateDict:
    """A model's tensors, each in memory of its own, on the CPU."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}


def own_names(model: Model, task: int, shared: frozenset[str]) -> frozenset[str]:
    """What belongs to the expert on a task alone."""
    return model.head_keys(task) - shared


def names_in_file(stream: Stream, shared: frozenset[str], own: frozenset[str]) -> frozenset[str]:
    """What lies in the file of an expert: a merge wants the same in all, a transport also wants the expert's own head."""
    return shared if stream.release is None else shared | own


def entry_of(recipe: BaseRecipe, state: StateDict) -> StateDict:
    """What the cache keeps of a base, out of the state of a model that starts from it."""
    brought = f"{HEADS}0." if recipe.has_head else BACKBONE
    return {name.removeprefix(BACKBONE): tensor for name, tensor in state.items() if name.startswith((BACKBONE, brought))}


def base_key_of(recipe: BaseRecipe, identity: str, device: torch.device) -> dict[str, Any]:
    """The key of a base in the cache, empty where it is not kept there."""
    return base_key(identity, device) if recipe.is_learned else {}


def _shared(run: CellRun, found: Mapping[str, Source]) -> frozenset[str]:
    """What all experts share.

    Raises:
        InputError: If one of them is not in the cache, with the command that makes it.
    """
    shared, missing = [], []
    for name, source in found.items():
        try:
            shared.append(expert_of(run, source).shared)
        except NotCachedError:
            missing.append(name)
    if missing:
        request = run.cell.request
        told = "".join(f" --set {one}" for one in origin_of(request, run.cell.stream)["set"])
        make = f"shiftproof experts train {request.stream} --seeds {request.seed}{told}"
        raise InputError(
            f"expected the experts of {request.stream} with seed {request.seed} in the cache, "
            f"got none of {', '.join(missing)}; `{make}` makes them"
        )
    return frozenset.intersection(*shared)


def _check_names(stream: Stream, found: Mapping[str, Source]) -> None:
    taken = {file.removesuffix(SUFFIX) for file in (BASE_FILE, RELEASE_FILE, HEADS_FILE)}
    for name in found:
        if name in taken or not FILE_NAME.fullmatch(name):
            raise InputError(
                f"expected experiences whose names can be those of files, got {name!r} of {stream.name}; "
                f"other than {', '.join(sorted(taken))}, letters, digits and '-' will do"
            )
