"""Exported experts into the cache of this machine, if a run here would take them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shiftproof.benchmark.cache import Cache, locked
from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.experiences import DataExperience, StateDict, state_sha256
from shiftproof.benchmark.experts.exporting import BACKBONE, base_key_of, entry_of, names_in_file, own_names, plain_state
from shiftproof.benchmark.experts.files import AGAIN, BASE_FILE, HEADS_FILE, RELEASE_FILE, SUFFIX, Export
from shiftproof.benchmark.experts.making import Source, check_fine_tuned, key_of, named_sources, onlooking
from shiftproof.benchmark.inventory import EXPERT
from shiftproof.benchmark.lifting import expert_facts
from shiftproof.benchmark.pretraining import BASE
from shiftproof.benchmark.recipes import BaseRecipe
from shiftproof.benchmark.records import RunRequest, canonical, sha256
from shiftproof.benchmark.registry.lookup import Registry
from shiftproof.benchmark.running.cells import origin_of
from shiftproof.benchmark.running.runner import CellRun
from shiftproof.benchmark.streams import Stream

NAMED = 3  # tensors or parts that an error names at most
# Parts of a key whose values, hashes, tell a person nothing.
HASHES = {
    "base": "weights of the base",
    "data": "training data",
    "sha256": "recipe, data or backbone of the base",
    "trainer": "code that fine-tunes",
}


@dataclass(frozen=True)
class Taken:
    """What became of a base or an expert of an export."""

    name: str
    state: Literal["imported", "found", "replaced"]


def import_experts(
    export: Export,
    registry: Registry,
    request: RunRequest,
    stream: Stream,
    cache: Cache,
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Taken]:
    """Take the files of an export into the cache, all or none, under the keys that the stream has here.

    Args:
        request: For the stream, the seed and the fold that the export names.
        force: Replace what the cache has under a key with other weights.

    Raises:
        InputError: If a run here would not look for these experts, a file is damaged, its tensors are not those of the
            stream's model, or the cache has others.
        OutputError: If the cache cannot be written.
    """
    found = _sources(export, request, stream)
    with _staging(cache.folder) as folder:
        staged = Cache(folder, makes=False)
        with onlooking(registry, request, stream, export.device, staged) as run:
            intake = _Intake(export, run, found)
            intake.stage_bases()
            for name, source in found.items():
                intake.stage_expert(name, source)
                progress(name)
        taken = [Taken(name, _state(name, kind, key, staged, cache, force)) for name, kind, key in intake.entries]
        for one, (_, kind, key) in zip(taken, intake.entries, strict=True):
            if one.state != "found":
                _move(staged.path(kind, key), cache.path(kind, key))
    return taken


class _Intake:
    """Files of an export on their way into a cache of their own, under keys that this machine's code computes.

    Attributes:
        start: State of the model that experts start from, out of the export's base.
        heads: Private heads, as in the file of them.
        entries: Name, kind and key of everything that was staged.
    """

    def __init__(self, export: Export, run: CellRun, found: Mapping[str, Source]) -> None:
        self.export, self.run, self.found = export, run, found
        self.stream, self.staged = run.cell.stream, run.context.cache
        with run.context.global_rng("init"):
            self.model = run.bases.untrained()
        self.start: StateDict = {}
        self.heads: StateDict = {}
        self.shared: frozenset[str] = frozenset()
        self.entries: list[tuple[str, str, dict[str, Any]]] = []

    def stage_bases(self) -> None:
        """Base and release; what starts from them here must be what the files hold."""
        stream, names = self.stream, self.model.state_dict().keys()
        base = self.export.weights(BASE_FILE)
        self._check_like(BASE_FILE, base, {name for name in names if name.startswith(BACKBONE) or name in base})
        self.shared = frozenset(base)
        private = names - self.shared
        if private and stream.release is None:
            self.heads = self.export.weights(HEADS_FILE)
            self._check_like(HEADS_FILE, self.heads, private)
        owned = set().union(*(own_names(self.model, _data(one).task, self.shared) for one in self.found.values()))
        kept = base | {name: tensor for name, tensor in self.heads.items() if name not in owned}
        self._stage_base("base", BASE_FILE, stream.base, stream.base_sha256, kept)
        self.start = plain_state(self.run.context.new_model())
        self._check_equal(BASE_FILE, kept, self.start)
        if stream.release is not None:
            release = self.export.weights(RELEASE_FILE)
            self._check_like(RELEASE_FILE, release, self.shared)
            self._stage_base("release", RELEASE_FILE, stream.release, stream.release_sha256, release)
            self._check_equal(RELEASE_FILE, release, plain_state(self.run.release()))

    def stage_expert(self, name: str, source: Source) -> None:
        """An expert as the cache keeps it: what is shared, its own head, and the heads of others as in the base."""
        file, key, experience = f"{name}{SUFFIX}", key_of(self.run, source), _data(source)
        self._check_key(file, EXPERT, key)
        own, tensors = own_names(self.model, experience.task, self.shared), self.export.weights(file)
        self._check_like(file, tensors, names_in_file(self.stream, self.shared, own))
        state = {**self.start, **{one: self.heads[one] for one in own if one in self.heads}, **tensors}
        facts = expert_facts(experience, self.stream, key, origin_of(self.run.cell.request, self.stream))
        self.staged.store(EXPERT, key, state, facts)
        self.entries.append((name, EXPERT, key))

    def _stage_base(self, name: str, file: str, recipe: BaseRecipe, identity: str, state: StateDict) -> None:
        key = base_key_of(recipe, identity, self.run.device)
        if key:
            self._check_key(file, BASE, key)
            self.staged.store(BASE, key, entry_of(recipe, state))
            self.entries.append((name, BASE, key))

    def _check_key(self, file: str, kind: str, here: dict[str, Any]) -> None:
        facts = self.export.facts(file)
        others = differences(facts.key, json.loads(canonical(here)))
        if others:
            raise InputError(
                f"{file}: expected what {self.stream.name} is here, got {_some(others)}; a run here would not take it"
            )
        if facts.cache_key != sha256([kind, here]):
            raise InputError(f"{file}: expected the hash of its key, got another; {AGAIN}")

    def _check_like(self, file: str, tensors: StateDict, names: Iterable[str]) -> None:
        model = self.model.state_dict()
        expected = {name: (tuple(model[name].shape), model[name].dtype) for name in names}
        got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        odd = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        if odd:
            raise InputError(
                f"{file}: expected the tensors of the model of {self.stream.name}, "
                f"got others, or of other shapes or dtypes: {_some(odd)}"
            )

    def _check_equal(self, file: str, theirs: StateDict, ours: StateDict) -> None:
        if odd := sorted(name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])):
            raise InputError(f"{file}: expected the model that {self.stream.name} starts from here, got others: {_some(odd)}")


def differences(told: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what a key of another machine differs from the one here, in words.

    >>> differences({"torch": "2.4.0", "recipe": {"lr": 0.1}}, {"torch": "2.15.0", "recipe": {"lr": 0.1}})
    ['torch 2.4.0 (here 2.15.0)']
    """
    found = []
    for name in sorted(told.keys() | here.keys()):
        theirs, ours = told.get(name), here.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            found += [f"{name}.{one}" for one in differences(theirs, ours)]
        elif theirs != ours:
            found.append(f"other {HASHES[name]}" if name in HASHES else f"{name} {theirs} (here {ours})")
    return found


def _sources(export: Export, request: RunRequest, stream: Stream) -> dict[str, Source]:
    check_fine_tuned(stream)
    if export.base.version != stream.version:
        raise InputError(
            f"{BASE_FILE}: expected version {stream.version} of {request.stream}, as it is here, "
            f"got version {export.base.version}; export it again with this version"
        )
    if export.device not in ("cpu", "cuda") or (export.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(
            f"expected experts that a run on this machine can take, got some that were made on {export.device!r}, "
            "which it does not have; train them with --device cpu"
        )
    found = named_sources(stream, request.fold)
    if found.keys() != set(export.experts):
        raise InputError(
            f"{BASE_FILE}: expected the experts of {request.stream}, {', '.join(found)}, got {', '.join(export.experts)}"
        )
    return found


def _state(
    name: str, kind: str, key: Mapping[str, Any], staged: Cache, cache: Cache, force: bool
) -> Literal["imported", "found", "replaced"]:
    before, new = cache.stored(kind, key), staged.stored(kind, key)
    assert new is not None
    if before is None:
        return "imported"
    if state_sha256(before) == state_sha256(new):
        return "found"
    if not force:
        raise InputError(
            f"{name}: expected a cache without it or with the same weights, got one with others; give --force to replace them"
        )
    return "replaced"


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside the entries, empty whatever an import that was killed has left; one import at a time."""
    staging = folder / "import"
    with locked(folder / "import.lock"):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    with locked(target.with_suffix(".lock")):
        try:
            os.replace(source, target)
        except OSError as error:
            raise OutputError(f"expected to write {target.name} into {target.parent}, got: {error.strerror}") from error


def _data(source: Source) -> DataExperience:
    assert isinstance(source.experience, DataExperience)
    return source.experience


def _some(items: list[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
