"""Predictions to integer counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiftproof.benchmark.errors import ContractError, NotFiniteError
from shiftproof.benchmark.experiences import EvalSet
from shiftproof.benchmark.metrics import Counts

EVAL_BATCH = 512


@dataclass(frozen=True)
class EvalCounts:
    """(correct, total) of one eval set, by group and by class."""

    groups: Counts
    classes: Counts


def evaluate(model: nn.Module, evals: Sequence[EvalSet], device: torch.device) -> list[EvalCounts]:
    """Counts of each eval set.

    Raises:
        NotFiniteError: If a logit is NaN or infinite: argmax of NaN is 0 and would look like an answer.
        ContractError: If the logits are not one row a sample with a column for every class: argmax would look like an answer.
    """
    return [_count(eval_set, *_predict(model, eval_set, device)) for eval_set in evals]


def _predict(model: nn.Module, eval_set: EvalSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N,) int64 predictions and targets over all parts."""
    predictions = []
    with evaluating(model), torch.no_grad():
        for task, data in eval_set.parts:
            for start in range(0, len(data), EVAL_BATCH):
                x = data.inputs(slice(start, start + EVAL_BATCH)).to(device)
                logits = model(x, task)
                _check_shape(logits, len(x), int(data.y.max()) + 1, eval_set.name)
                if not bool(torch.isfinite(logits).all()):
                    raise NotFiniteError(f"expected finite logits on eval set {eval_set.name!r}, got NaN or infinity")
                predictions.append(logits.argmax(dim=1).cpu())
    return torch.cat(predictions), torch.cat([data.y for _, data in eval_set.parts])


def _check_shape(logits: Tensor, samples: int, classes: int, name: str) -> None:
    if logits.ndim != 2 or len(logits) != samples or logits.shape[1] < classes:
        expected = f"({samples}, C) logits with C of at least {classes}"
        raise ContractError(f"expected {expected} on eval set {name!r}, one a class, got {tuple(logits.shape)}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode is restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _count(eval_set: EvalSet, predictions: Tensor, targets: Tensor) -> EvalCounts:
    correct = predictions == targets
    classes = int(targets.max()) + 1
    return EvalCounts(_tally(correct, eval_set.groups, len(eval_set.group_names)), _tally(correct, targets, classes))


def _tally(correct: Tensor, labels: Tensor, count: int) -> Counts:
    right = torch.bincount(labels[correct], minlength=count)
    total = torch.bincount(labels, minlength=count)
    return tuple((int(c), int(n)) for c, n in zip(right, total, strict=True))
