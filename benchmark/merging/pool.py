"""Threads with one tensor each, and a bound on the bytes that they hold together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

T = TypeVar("T")
R = TypeVar("R")


class Budget:
    """Lets items in, in their order, as long as they fit; one that never fits goes alone."""

    def __init__(self, limit: int, slots: int) -> None:
        self._limit, self._slots = limit, slots
        self._held: list[int] = []
        self._changed = threading.Condition()

    def enter(self, cost: int) -> None:
        """Wait for room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._fits(cost))
            self._held.append(cost)

    def leave(self, cost: int) -> None:
        """Make room."""
        with self._changed:
            self._held.remove(cost)
            self._changed.notify_all()

    def _fits(self, cost: int) -> bool:
        return len(self._held) < self._slots and sum(self._held) + cost <= self._limit


def mapped(function: Callable[[T], R], items: Sequence[T], cost: Callable[[T], int], jobs: int, limit: int) -> list[R]:
    """`function` of every item, in their order, by `jobs` threads that hold at most `limit` bytes together.

    The first error ends it: what has begun is finished, nothing else begins.

    Args:
        cost: Bytes that an item holds while it is worked on.
    """
    if jobs == 1:
        return [function(item) for item in items]
    budget, failed = Budget(limit, jobs), threading.Event()

    def work(item: T) -> R:
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise
        finally:
            budget.leave(cost(item))

    futures: list[Future[R]] = []
    # torch counts its threads anew in each of ours
    with ThreadPoolExecutor(jobs, initializer=lambda: torch.set_num_threads(1)) as pool:
        for item in items:
            budget.enter(cost(item))
            if failed.is_set():
                break
            futures.append(pool.submit(work, item))
    return [future.result() for future in futures]


@contextmanager
def one_thread_each(jobs: int) -> Iterator[None]:
    """Linear algebra on one thread while `jobs` threads of ours use it: threads that spin beside each other only cost time."""
    if jobs == 1:
        yield
        return
    threads = torch.get_num_threads()
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
