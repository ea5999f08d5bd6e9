"""Any strategy of Avalanche as a strategy here: its loop and its plugins, our data, model and recipe."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from shiftproof.benchmark import DataExperience, InputError, Model, RunContext
from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.strategies.avalanche.data import to_experience
from shiftproof.strategies.optimizers import learning_rate, make_optimizer

if TYPE_CHECKING:
    from avalanche.training.templates import SupervisedTemplate

C = TypeVar("C")


class AvalancheParts(TypedDict):
    """The keyword arguments that every SupervisedTemplate takes, filled from the stream: hand them on as `**parts`.

    `model` is Avalanche's multi-task module, or a plain one where all tasks share a head; `plugins` begins with the stream's
    recipe, and others may be appended; `evaluator` measures and prints nothing.
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
    size, clipping, precision, and augmentation, also of what comes back from a buffer. Whatever Avalanche draws, it draws
    inside a fence of its own. An interrupted cell starts again, since Avalanche cannot stop in the middle.
    """

    def __init__(self, config: C, context: RunContext) -> None:
        self.config = config
        self.context = context
        with context.global_rng("avalanche", "template"), _quiet():
            self._recipe = _RecipePlugin(context)
            parts = _parts(_wrapped(context.new_model(), context), self._recipe, context)
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
            InputError: If the template has a loop of its own that the recipe cannot reach.
        """
        shared = len(self.model().heads) == 1
        with self.context.global_rng("avalanche", experience.index), _quiet():
            one = to_experience(experience, self.context.recipe, shared, self._seen)
            self._template.train(one, eval_streams=[])
        self._seen.update(one.classes_in_this_experience)
        return {"loss": self._recipe.loss}

    def model(self) -> Model:
        """The model to evaluate."""
        model: Model = self._template.model.net
        return model

    def _refuse_altered(self, parts: AvalancheParts) -> None:
        keeps = {
            "model": self._template.model is parts["model"],
            "optimizer": self._template.optimizer is parts["optimizer"],
            "train_mb_size": self._template.train_mb_size == parts["train_mb_size"],
            "train_epochs": self._template.train_epochs == parts["train_epochs"],
            "plugins": self._recipe in self._template.plugins,
        }
        altered = [name for name, kept in keeps.items() if not kept]
        if altered:
            raise InputError(
                f"{type(self).__name__}.template: expected an Avalanche strategy with the stream's model and recipe, "
                f"got one with its own {', '.join(altered)}; make it with **parts"
            )


class _RecipePlugin:
    """What of the recipe does not fit into a template's arguments. Avalanche asks any object for these methods by name.

    It comes first. So the loss is looked at before projections of the gradient choke on a NaN; those are made in
    `after_backward`, so that `before_update` clips what is left of the gradient.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.loss = 0.0  # mean over the last epoch
        self._done = 0  # steps of this experience
        self._losses: list[float] = []  # of this epoch

    def before_training_exp(self, template: Any, **_: Any) -> None:
        template.optimizer.state.clear()
        self._done = 0

    def after_backward(self, template: Any, **_: Any) -> None:
        loss = float(template.loss.detach())
        if not math.isfinite(loss):
            raise NotFiniteError(f"expected a finite loss, got {loss} in step {self._done} of the experience")
        self._losses.append(loss)

    def before_update(self, template: Any, **_: Any) -> None:
        recipe = self.context.recipe
        for group in template.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self._done, recipe.epochs * len(template.dataloader))
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(template.model.parameters(), recipe.clip_norm)
        self._done += 1
        self.context.cost.optimizer_steps += 1

    def after_training_epoch(self, template: Any, **_: Any) -> None:
        self.context.cost.samples_seen += len(template.adapted_dataset)  # without what a buffer adds to the batches
        if self._losses:
            self.loss = sum(self._losses) / len(self._losses)
        self._losses = []

    def after_training_exp(self, template: Any, **_: Any) -> None:
        if self._done == 0:
            raise InputError(
                f"{type(template).__name__}: expected a loop that calls before_update, got one that does not, "
                "so that the learning rate of the stream's recipe cannot be set; this strategy cannot be used here"
            )


class _SharedHead(nn.Module):
    """A model with one head as Avalanche has them: no task labels."""

    def __init__(self, net: Model, context: RunContext) -> None:
        super().__init__()
        self.net = net
        self.task = int(next(iter(net.heads)))
        self.precision = _precision(context)

    def forward(self, x: Tensor) -> Tensor:
        with self.precision:
            logits: Tensor = self.net(x, self.task)
        return logits.float()


def _wrapped(net: Model, context: RunContext) -> nn.Module:
    """Our model as Avalanche calls one, in the recipe's precision."""
    return _SharedHead(net, context) if len(net.heads) == 1 else _multi_task(net, context)


def _multi_task(net: Model, context: RunContext) -> nn.Module:
    """A model with several heads. The class is defined in here because its base comes with all of Avalanche."""
    from avalanche.models import MultiTaskModule

    class MultiTask(MultiTaskModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.precision = _precision(context)

        def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Any:
            with self.precision:
                features = self.net.features(x)
                if task_labels is None:  # by the head of every task met so far, for distillation
                    known = sorted(self.known_train_tasks_labels)
                    return {task: self.net.classify(features, task).float() for task in known}
                if isinstance(task_labels, Tensor):
                    task_labels = task_labels.to(x.device)  # A-GEM and GEM leave them on the CPU
                return self.net.classify(features, task_labels).float()

        def forward_single_task(self, x: Tensor, task_label: int) -> Any:
            return self.forward(x, task_label)

    return MultiTask()


def _precision(context: RunContext) -> AbstractContextManager[Any]:
    is_bfloat16 = context.recipe.precision == "bfloat16"
    return torch.autocast(context.device.type, torch.bfloat16) if is_bfloat16 else nullcontext()


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
    """Why a strategy that needs these modules cannot run here, for `StrategySpec.unavailable`; empty if it can.

    None of them is imported.
    """
    absent = [module for module in modules if find_spec(module) is None]
    packages = " ".join("avalanche-lib" if module == "avalanche" else module for module in absent)
    return f"needs {packages}, which is not installed: pip install {packages}" if absent else ""
