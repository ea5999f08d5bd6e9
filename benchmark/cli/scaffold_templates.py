"""Texts of the package that `shiftproof new-strategy` writes; $name, $module, $short and $cls are filled in."""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "shiftproof-$name"
version = "0.1.0"
description = "The strategy $name for shiftproof"
requires-python = ">=3.11"
dependencies = ["shiftproof"]

[project.optional-dependencies]
dev = ["pytest"]

# This line makes the strategy known: `shiftproof list strategies` shows it once the package is installed.
[project.entry-points.shiftproof]
$name = "$module"

[tool.setuptools.packages.find]
where = ["src"]

[tool.pytest.ini_options]
addopts = "-p shiftproof.benchmark.pytest_plugin"  # the fixture `conformance`
testpaths = ["tests"]
"""

MODULE = '''\
"""$name: cross-entropy with a bonus for uncertain predictions, to be changed into a method of your own."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from shiftproof.benchmark import Batch, DataExperience, StrategySpec, hookimpl
from shiftproof.strategies import TrainingStrategy
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ${cls}Config:
    """Each knob with its default from the paper, its range in the type, and one line of comment."""

    beta: Annotated[float, Ge(0)] = 0.1  # weight of the entropy; 0 = plain cross-entropy


class $cls(TrainingStrategy[${cls}Config]):
    """Cross-entropy minus beta times the entropy of the prediction."""

    def loss(self, batch: Batch) -> Tensor:
        """The scalar to minimize on a batch."""
        return penalized(self.logits(batch), batch.y, self.config.beta)


def penalized(logits: Tensor, y: Tensor, beta: float) -> Tensor:
    """Mean cross-entropy minus beta times the mean entropy of (B, C) float32 logits; y is (B,) int64."""
    log_p = logits.log_softmax(dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)  # (B,)
    return F.cross_entropy(logits, y) - beta * entropy.mean()


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[${cls}Config]]:
    """What this package contributes."""
    reference = "Pereyra et al., ICLR 2017 workshop, arXiv:1701.06548"  # the citation of your own method goes here
    return [StrategySpec("$name", $cls, ${cls}Config, DataExperience, reference)]
'''

TEST = '''\
"""What $name computes, and that it keeps the contract of shiftproof."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from $module import penalized


def test_without_its_bonus_it_is_cross_entropy() -> None:
    logits, y = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([0, 1])
    assert torch.equal(penalized(logits, y, beta=0.0), F.cross_entropy(logits, y))


def test_a_uniform_prediction_over_two_classes_earns_beta_times_log_two() -> None:
    logits, y = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    assert penalized(logits, y, beta=0.5).item() == pytest.approx(math.log(2) - 0.5 * math.log(2))


def test_it_keeps_the_contract(conformance: Callable[[str], None]) -> None:
    conformance("$name")
'''

README = """\
# shiftproof-$name

The strategy `$name` for shiftproof, in one file: `src/$module/__init__.py`.

```
pip install -e .
shiftproof show $name
shiftproof run --stream b-digits --strategy $name,sgd,er --seeds 0,1,2
```

1. Write the method: `loss`, the knobs with their defaults and ranges, and the citation in `StrategySpec`.
2. Say in `tests/test_$short.py` what it must compute, in a case that can be worked out by hand.
3. `pip install -e .[dev] && pytest`, or `shiftproof check $name` for the contract alone.

`shiftproof list strategies` shows what to compare it with.
"""

FILES = {
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    "src/$module/__init__.py": MODULE,
    "tests/test_$short.py": TEST,
}
"""Path to text."""
