"""Any strategy of Avalanche as a strategy here: its loop and its plugins, our data, model and recipe."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from shiftproof.benchmark import DataExperience, InputError, Model, RunContext
from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.strategies.avalanche.data import to_experience
from shiftproof.strategies.training import learning_rate, make_optimizer

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

C = TypeVar("C")


class AvalancheParts(TypedDict):
    """The keyword arguments that every SupervisedTemplate takes, filled from the stream: hand them on as `**parts`.

    `model` takes task labels; `plugins` holds the stream's recipe and has to stay first; `evaluator` measures and prints nothing.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    criterion: nn.Module
    train_mb_size: int
    train_epochs: int
    eval_mb_size: int
    device: torch.device
    plugins: list[Any]
    evaluator: Any


class AvalancheStrategy(ABC, Generic[C]):
    """Learns with an Avalanche strategy: write `template`.

    All of the recipe holds: optimizer (its state starts anew with every experience), learning rate of every step, epochs, batch
    size, clipping, augmentation (of training inputs and of what comes back from a buffer) and precision. Whatever Avalanche
    draws, it draws inside a fence of its own. An interrupted cell starts again, since Avalanche cannot stop in the middle.

    Attributes:
        net: The model that is trained; starts as `context.new_model()`.
    """

    def __init__(self, config: C, context: RunContext) -> None:
        self.config = config
        self.context = context
        self.net: Model = context.new_model()
        with context.global_rng("avalanche", "template"), _quiet():
            self._model = _task_aware(self.net, context)
            self._recipe = _RecipePlugin(context)
            parts = _parts(self._model, self._recipe, context)
            self._template = self.template(parts)
        self._refuse_altered(parts)
        self._seen: set[int] = set()

    @abstractmethod
    def template(self, parts: AvalancheParts) -> SupervisedTemplate:
        """The Avalanche strategy, made with `**parts`."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Train on one experience.

        Raises:
            NotFiniteError: If the loss is NaN or infinite.
        """
        with self.context.global_rng("avalanche", experience.index), _quiet():
            one = to_experience(experience, self.context.recipe, self._seen)
            self._template.train(one, eval_streams=[])
        self._seen |= one.classes_in_this_experience
        return {"loss": self._recipe.mean_loss()}

    def model(self) -> nn.Module:
        """The model to evaluate."""
        # Some strategies (iCaRL, say) answer with a module of their own.
        return self.net if self._template.model is self._model else _Answers(self._template.model)

    def _refuse_altered(self, parts: AvalancheParts) -> None:
        kept = {
            "optimizer": self._template.optimizer is parts["optimizer"],
            "train_mb_size": self._template.train_mb_size == parts["train_mb_size"],
            "train_epochs": self._template.train_epochs == parts["train_epochs"],
            "plugins": self._recipe in self._template.plugins,
        }
        altered = [name for name, holds in kept.items() if not holds]
        if altered:
            raise InputError(
                f"{type(self).__name__}.template: expected a template that keeps the stream's recipe, got one with its own "
                f"{', '.join(altered)}; make it with **parts"
            )


class _RecipePlugin:
    """What of the recipe does not fit into a template's arguments. Avalanche asks any object for these methods by name.

    It comes first in every template: its `before_update` precedes other updates of the gradient only if those are made in
    `after_backward`, where Avalanche's gradient projections are.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.done = 0  # steps of this experience
        self.losses: list[float] = []  # of this epoch

    def mean_loss(self) -> float:
        """Over the last epoch."""
        return sum(self.losses) / len(self.losses)

    def before_training_exp(self, template: Any, **_: Any) -> None:
        template.optimizer.state.clear()
        self.done = 0

    def before_training_epoch(self, template: Any, **_: Any) -> None:
        self.losses = []

    def after_backward(self, template: Any, **_: Any) -> None:
        self.losses.append(float(template.loss.detach()))
        if not math.isfinite(self.losses[-1]):
            raise NotFiniteError(f"expected a finite loss, got {self.losses[-1]} in step {self.done} of the experience")

    def before_update(self, template: Any, **_: Any) -> None:
        recipe = self.context.recipe
        for group in template.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.done, recipe.epochs * len(template.dataloader))
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(template.model.parameters(), recipe.clip_norm)

    def after_update(self, template: Any, **_: Any) -> None:
        self.done += 1
        self.context.cost.optimizer_steps += 1

    def after_training_epoch(self, template: Any, **_: Any) -> None:
        self.context.cost.samples_seen += len(template.adapted_dataset)  # without what a buffer adds to the batches


class _Answers(nn.Module):
    """An Avalanche model as `forward(x, task)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        from avalanche.models import avalanche_forward

        logits: Tensor = avalanche_forward(self.inner, x, task)
        return logits


def _task_aware(net: Model, context: RunContext) -> nn.Module:
    """Our model as Avalanche's multi-task module, in the recipe's precision. It is defined here because its base is heavy."""
    from avalanche.models import MultiTaskModule

    class TaskAware(MultiTaskModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Any:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=context.recipe.precision == "bfloat16"):
                features = self.net.features(x)
                if task_labels is None:  # of every task met so far, for distillation
                    known = sorted(self.known_train_tasks_labels)
                    return {task: self.net.classify(features, task).float() for task in known}
                if isinstance(task_labels, Tensor):
                    task_labels = task_labels.to(x.device)  # A-GEM and GEM leave them on the CPU
                return self.net.classify(features, task_labels).float()

        def forward_single_task(self, x: Tensor, task_label: int) -> Any:
            return self.forward(x, task_label)

    return TaskAware()


def _parts(model: nn.Module, recipe_plugin: _RecipePlugin, context: RunContext) -> AvalancheParts:
    from avalanche.training.plugins import EvaluationPlugin

    recipe = context.recipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that nothing will be printed, which is what we want
        evaluator = EvaluationPlugin()
    return AvalancheParts(
        model=model,
        optimizer=make_optimizer(recipe, [one for one in model.parameters() if one.requires_grad]),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=recipe.batch_size,
        train_epochs=recipe.epochs,
        eval_mb_size=recipe.batch_size,
        device=context.device,
        plugins=[recipe_plugin],
        evaluator=evaluator,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Avalanche 0.6.0 calls what it has deprecated itself, and alters the process's warning filters when it does."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        if not issubclass(one.category, DeprecationWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def missing(*modules: str) -> str:
    """Why a strategy that needs these modules cannot run here; empty if it can. Imports none of them."""
    absent = [module for module in modules if find_spec(module) is None]
    packages = " ".join("avalanche-lib" if module == "avalanche" else module for module in absent)
    return f"needs {packages}, which is not installed: pip install {packages}" if absent else ""
