"""Order, bounds and errors of the threads."""

from __future__ import annotations

import threading
import time

import pytest

from shiftproof.benchmark.merging.pool import mapped


class Watch:
    """Notes how much is held at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: list[int] = []
        self.most = self.together = 0

    def work(self, cost: int) -> int:
        with self.lock:
            self.held.append(cost)
            self.most, self.together = max(self.most, sum(self.held)), max(self.together, len(self.held))
        time.sleep(0.005)
        with self.lock:
            self.held.remove(cost)
        return cost


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(jobs: int) -> None:
    items = [7, 1, 5, 3, 3, 9, 2]
    assert mapped(Watch().work, items, int, jobs, 100) == items


def test_what_is_held_together_stays_within_the_limit() -> None:
    watch = Watch()
    mapped(watch.work, [6, 5, 4, 3, 2, 2, 1, 1], int, 4, 10)
    assert watch.most <= 10
    assert 2 <= watch.together <= 4


def test_a_small_item_goes_before_a_large_one_that_does_not_fit() -> None:
    begun = []
    gate = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            gate.set()
        assert item != 8 or gate.wait(5)
        return item

    assert mapped(work, [8, 7, 1], int, 2, 10) == [8, 7, 1]
    assert begun == [8, 1, 7]


def test_an_item_above_the_limit_goes_alone() -> None:
    watch = Watch()
    assert mapped(watch.work, [50, 1, 1], int, 3, 10) == [50, 1, 1]
    assert watch.most == 50


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_error_ends_it(jobs: int) -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ValueError("three")
        time.sleep(0.002)
        return item

    with pytest.raises(ValueError, match="three"):
        mapped(work, list(range(100)), lambda item: 1, jobs, 10)
    assert len(begun) < 20
