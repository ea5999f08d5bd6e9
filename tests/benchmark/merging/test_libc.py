"""Calls of the C library."""

from __future__ import annotations

import os
import sys

from shiftproof.benchmark.merging.libc import hint


def test_a_function_is_called_on_linux_and_nowhere_else() -> None:
    before = os.umask(0o22)
    try:
        hint("umask", 0o77)
    finally:
        found = os.umask(before)
    assert found == (0o77 if sys.platform == "linux" else 0o22)


def test_a_function_that_the_library_lacks_is_passed_over() -> None:
    before = os.umask(0o22)
    hint("no_function_has_this_name", 0o77)
    assert os.umask(before) == 0o22
