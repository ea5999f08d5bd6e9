"""Waiting for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest


def _eventually(fact: Callable[[], Any], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if fact():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def eventually() -> Callable[..., bool]:
    """`eventually(fact, seconds)`: whether it comes true in time."""
    return _eventually
