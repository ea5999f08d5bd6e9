"""Predictions to integer counts, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import Tensor, nn

from shiftproof.benchmark import ArrayData, EvalSet, evaluating
from shiftproof.benchmark.errors import ContractError, NotFiniteError
from shiftproof.benchmark.evaluation import EVAL_BATCH, evaluate

CPU = torch.device("cpu")


class Oracle(nn.Module):
    """Logits are the inputs; the task is added to the class that is meant."""

    def forward(self, x: Tensor, task: int) -> Tensor:
        return x.roll(task, dims=1)


def random_set(seed: int, tasks: tuple[int, ...], sizes: tuple[int, ...], classes: int = 4, groups: int = 5) -> EvalSet:
    rng = np.random.default_rng(seed)
    parts = []
    for task, size in zip(tasks, sizes, strict=True):
        x = torch.from_numpy(rng.standard_normal((size, classes)).astype(np.float32))
        parts.append((task, ArrayData(x, torch.from_numpy(rng.integers(0, classes, size)))))
    of_group = torch.from_numpy(rng.integers(0, groups - 1, sum(sizes)))  # the last group has no members
    return EvalSet(f"set-{seed}", tuple(parts), of_group, tuple(f"g{i}" for i in range(groups)))


def predicted(eval_set: EvalSet) -> tuple[np.ndarray, np.ndarray]:
    """By numpy: predictions and targets over all parts."""
    guesses = [np.roll(data.x.numpy(), task, axis=1).argmax(1) for task, data in eval_set.parts]
    return np.concatenate(guesses), np.concatenate([data.y.numpy() for _, data in eval_set.parts])


@pytest.mark.parametrize("sizes", [(7, 30), (EVAL_BATCH, 1), (EVAL_BATCH + 3, 2 * EVAL_BATCH - 1)])
def test_counts_are_those_of_scikit_learn(sizes: tuple[int, int]) -> None:
    eval_set = random_set(0, (0, 2), sizes)
    (counts,) = evaluate(Oracle(), [eval_set], CPU)
    guess, target = predicted(eval_set)
    matrix = confusion_matrix(target, guess, labels=range(4))
    assert counts.classes == tuple(zip(matrix.diagonal().tolist(), matrix.sum(1).tolist(), strict=True))
    for group, (correct, total) in enumerate(counts.groups):
        member = eval_set.groups.numpy() == group
        assert total == member.sum()
        if total:
            assert correct / total == pytest.approx(accuracy_score(target[member], guess[member]))
    assert counts.groups[-1] == (0, 0)


def test_groups_and_classes_add_up_to_the_same() -> None:
    (counts,) = evaluate(Oracle(), [random_set(1, (1,), (200,))], CPU)
    assert [sum(column) for column in zip(*counts.groups, strict=True)] == [
        sum(column) for column in zip(*counts.classes, strict=True)
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused_by_name_of_the_set(value: float) -> None:
    eval_set = random_set(2, (0,), (EVAL_BATCH + 9,))
    eval_set.parts[0][1].x[-1, 3] = value
    with pytest.raises(NotFiniteError, match="expected finite logits on eval set 'set-2'"):
        evaluate(Oracle(), [eval_set], CPU)


class Shaped(nn.Module):
    """Answers in another shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, task: int) -> Tensor:
        return torch.zeros(len(x), *self.shape)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)], ids=str)
def test_logits_of_another_shape_than_one_a_class_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ContractError, match=r"expected \(20, C\) logits with C of at least 4 on eval set 'set-5', one a class"):
        evaluate(Shaped(*shape), [random_set(5, (0,), (20,))], CPU)


def test_logits_for_more_classes_than_the_set_has_are_answers() -> None:
    (counts,) = evaluate(Shaped(9), [random_set(5, (0,), (20,))], CPU)
    assert sum(total for _, total in counts.groups) == 20


class Moody(Oracle):
    """Alters its input in place, and refuses to answer in training mode or with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(2).eval()
        self.trained = nn.Dropout()

    def forward(self, x: Tensor, task: int) -> Tensor:
        assert not any(module.training for module in self.modules())
        assert not torch.is_grad_enabled()
        return super().forward(x.mul_(2), task)


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_every_module_gets_its_own_mode_back_also_where_some_were_frozen() -> None:
    model = Moody()
    before = modes(model)
    assert sorted(before.values()) == [False, True, True]
    evaluate(model, [random_set(3, (0,), (20,))], CPU)
    assert modes(model) == before


def test_modes_come_back_when_the_model_raises() -> None:
    model = Moody()
    before = modes(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert modes(model) == before


def test_a_model_that_alters_its_input_in_place_does_not_alter_the_data() -> None:
    eval_set = random_set(4, (0,), (20,))
    before = eval_set.parts[0][1].x.clone()
    first = evaluate(Moody(), [eval_set], CPU)
    assert torch.equal(eval_set.parts[0][1].x, before)
    assert evaluate(Moody(), [eval_set], CPU) == first


def test_every_set_is_counted_by_itself_and_in_order() -> None:
    sets = [random_set(seed, (0,), (30 + seed,)) for seed in range(3)]
    together = evaluate(Oracle(), sets, CPU)
    assert together == [evaluate(Oracle(), [one], CPU)[0] for one in sets]
