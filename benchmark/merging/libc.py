"""Calls of the C library that Python does not wrap."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def hint(name: str, *arguments: object) -> None:
    """Call a function where there is one of that name, and do not look at what it returns: nothing may depend on it."""
    function = getattr(_library(), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


@cache
def _library() -> Any:
    return ctypes.CDLL(None)
