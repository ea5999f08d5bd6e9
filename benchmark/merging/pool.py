"""Threads with one tensor each, and a bound on the bytes that they hold together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from shiftproof.benchmark.merging.libc import hint

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # of glibc's malloc.h
_OWN_PAGES = 1 << 23  # bytes from which memory comes from the system and goes back to it: large matrices
_KEPT = 1 << 24  # bytes of freed memory that stay in the heap

T = TypeVar("T")
R = TypeVar("R")


def mapped(function: Callable[[T], R], items: Sequence[T], cost: Callable[[T], int], jobs: int, limit: int) -> list[R]:
    """`function` of every item, in their order, by `jobs` threads that hold at most `limit` bytes together.

    Of the items that are left the first that fits goes next; one that never fits goes alone. The first error ends it: what has
    begun is finished, nothing else begins.

    Args:
        cost: Bytes that an item holds while it is worked on.
    """
    if jobs == 1:
        return [function(item) for item in items]
    costs = [cost(item) for item in items]
    held: dict[int, int] = {}
    changed, failed = threading.Condition(), threading.Event()
    futures: dict[int, Future[R]] = {}

    def work(position: int) -> R:
        try:
            return function(items[position])
        except BaseException:
            failed.set()
            raise
        finally:
            if costs[position] > limit // jobs:
                hint("malloc_trim", 0)  # the allocator would keep what was freed for the next tensor of that size
            with changed:
                del held[position]
                changed.notify()

    def fitting(pending: Sequence[int]) -> int | None:
        room = limit - sum(held.values())
        return next((position for position in pending if not held or (len(held) < jobs and costs[position] <= room)), None)

    pending = list(range(len(items)))
    # torch counts its threads anew in each of ours
    with ThreadPoolExecutor(jobs, initializer=partial(torch.set_num_threads, 1)) as pool, changed:
        while pending and not failed.is_set():
            if (position := fitting(pending)) is None:
                changed.wait()
                continue
            pending.remove(position)
            held[position] = costs[position]
            futures[position] = pool.submit(work, position)
    return [futures[position].result() for position in sorted(futures)]


def few_arenas() -> None:
    """Let the threads of this process share one heap: what one has freed another can use. Before any of them starts.

    A run of elements is freed and taken again hundreds of times: it stays in the heap, as fresh pages cost more than what is
    computed on them.
    """
    for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _OWN_PAGES), (_TRIM_THRESHOLD, _KEPT)):
        hint("mallopt", option, value)


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
