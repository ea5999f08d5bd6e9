"""The conformance kit for pytest: `pytest -p shiftproof.benchmark.pytest_plugin`, or the same in `addopts`.

```python
def test_my_strategy_conforms(conformance):
    conformance("my-strategy")
```
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shiftproof.benchmark.conformance import check_strategy


@pytest.fixture
def conformance() -> Callable[..., None]:
    """A function that fails the test with the checks that a strategy does not pass."""

    def check(label: str, files: Sequence[str | Path] = ()) -> None:
        failed = [result for result in check_strategy(label, files) if not result.passed]
        assert not failed, "\n".join(f"{result.name}: {result.detail}" for result in failed)

    return check
