"""What a strategy is given: randomness by purpose, device, the base model, the cache, checkpoints."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import State
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.recipes import Recipe

CHECKPOINT_SECONDS = 30.0
CHECKPOINT_SHARE = 0.02  # of the time, at most


@dataclass
class Cost:
    """What a cell has used so far; strategies count their own steps."""

    samples_seen: int = 0
    optimizer_steps: int = 0
    experts_trained: int = 0
    experts_reused: int = 0  # out of the cache


def derive_seed(seed: int, purpose: str, *position: int | str) -> int:
    """A 63-bit seed that depends on nothing but its arguments."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, position))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Checkpointer:
    """Calls `write` from time to time: never more often than every `seconds`, never for more than 2 % of the time."""

    def __init__(self, write: Callable[[State | None], None], seconds: float = CHECKPOINT_SECONDS) -> None:
        self.write = write
        self.seconds = seconds
        self.share = CHECKPOINT_SHARE if seconds > 0 else 1.0
        self.next = time.monotonic() + seconds
        self.tried = False

    def tick(self, state: Callable[[], State]) -> None:
        """Write a checkpoint if one is due. What cannot be saved is an error at the first tick, not half a minute later."""
        if not self.tried:
            self.tried = True
            state()
        started = time.monotonic()
        if started < self.next:
            return
        self.write(state())
        now = time.monotonic()
        self.next = now + max(self.seconds, (now - started) * (1 / self.share - 1))


class RunContext:
    """The surroundings of one cell.

    Attributes:
        seed: Of the run. Do not seed anything with it directly: ask for `generator` or `global_rng`.
        device: Where models and batches live.
        recipe: Budget and optimization of every experience.
        cache: For what depends on content only.
        workdir: Scratch folder of the cell, made on first use by whoever writes there.
        cost: Counters for the record.
    """

    def __init__(
        self,
        seed: int,
        recipe: Recipe,
        base: Callable[[], tuple[Model, StateDict]],
        base_sha256: str,
        cache: Cache,
        workdir: Path,
        device: torch.device | str = "cpu",
        checkpointer: Checkpointer | None = None,
    ) -> None:
        self.seed = seed
        self.recipe = recipe
        self.base_sha256 = base_sha256
        self.cache = cache
        self.workdir = workdir
        self.device = torch.device(device)
        self.cost = Cost()
        self._base = base
        self._prototype: Model | None = None
        self._checkpointer = checkpointer

    def __deepcopy__(self, memo: dict[int, object]) -> RunContext:
        """There is one context in a cell: a copied strategy or container keeps it, and does not drag the data along."""
        return self

    def generator(self, purpose: str, *position: int | str) -> torch.Generator:
        """A fresh CPU generator for one purpose at one position: nothing to checkpoint, and no purpose shifts another.

        >>> context = RunContext(0, Recipe(), lambda: (None, {}), "", Cache(), Path())
        >>> a = torch.rand(1, generator=context.generator("replay", 1, 2))
        >>> bool(a == torch.rand(1, generator=context.generator("replay", 1, 2)))
        True
        """
        return torch.Generator().manual_seed(derive_seed(self.seed, purpose, *position))

    @contextmanager
    def global_rng(self, purpose: str, *position: int | str) -> Iterator[None]:
        """Seed the global generators of torch, numpy and random inside, and restore them after.

        For code that cannot be handed a generator: dropout, module initialization, torchvision transforms, Avalanche.
        """
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.seed_global(purpose, *position)
        try:
            yield
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])
            random.setstate(before[2])
            if cuda is not None:
                torch.cuda.set_rng_state_all(cuda)

    def seed_global(self, purpose: str, *position: int | str) -> None:
        """Seed the global generators for one position; only inside `global_rng`, which restores them."""
        seed = derive_seed(self.seed, purpose, *position)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def new_model(self) -> Model:
        """A copy of the stream's base with the heads it brings and others freshly initialized; every call gives the same."""
        if self._prototype is None:
            # Building a network draws from the global generators; only the heads' draw is kept.
            with self.global_rng("init"):
                model, weights = self._base()
            model.load_base(weights)
            self._prototype = model.to(self.device)
        return deepcopy(self._prototype)

    def child(self, purpose: str) -> RunContext:
        """A context with the same base and generators of its own, which depend on seed and purpose; it has no checkpoints."""
        self.new_model()
        seed = derive_seed(self.seed, purpose)
        child = RunContext(seed, self.recipe, self._base, self.base_sha256, self.cache, self.workdir, self.device)
        child._prototype = self._prototype
        return child

    def tick(self, state: Callable[[], State]) -> None:
        """Offer a moment at which the strategy can be checkpointed; costs a clock reading."""
        if self._checkpointer is not None:
            self._checkpointer.tick(state)
