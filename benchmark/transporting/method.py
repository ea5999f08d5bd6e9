"""What the harness asks of a strategy that transports by an alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.alignment import Alignment
from shiftproof.benchmark.transporting.specification import PermutationSpec

Progress = Callable[[int, str], None]
"""Told of the sweep and of each permutation that was looked at."""


def silent(sweep: int, permutation: str) -> None:
    """Tells nobody."""


@runtime_checkable
class RebasinMethod(Protocol):
    """Finds an alignment once, and carries any number of task vectors along it."""

    config: Any

    def align(
        self, source: StateDict, target: StateDict, specification: PermutationSpec, progress: Progress = silent
    ) -> Alignment:
        """Permutations that bring `source` next to `target`."""
        ...
