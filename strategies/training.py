"""The contract of strategies that train: write a loss; optimizer, schedule, device and checkpoints are given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from shiftproof.benchmark import Batch, DataExperience, Model, Recipe, RunContext, as_float
from shiftproof.benchmark.errors import NotFiniteError
from shiftproof.strategies.augmentation import augment
from shiftproof.strategies.fused_heads import FusedHeads, may_fuse
from shiftproof.strategies.optimizers import FlatSGD, clip_and_step, learning_rate, make_optimizer
from shiftproof.strategies.replay import Memory
from shiftproof.strategies.state import decode, encode, objects

C = TypeVar("C")

State = dict[str, Any]

_TRANSIENT = frozenset(
    {"config", "context", "experience", "_optimizer", "_updated", "_constructed", "_may_fuse", "_is_fusing", "_fused"}
)


class TrainingStrategy(ABC, Generic[C]):
    """Trains one model by gradient descent with the stream's recipe.

    Write `loss`. Inside it, `self.logits(batch)` are the logits of each sample's own task, `self.features(batch.x)` the
    backbone's features. The moments `before_experience`, `before_epoch`, `after_step` and `after_experience` are optional.
    Every attribute that is set on the strategy goes into checkpoints by itself.

    Attributes:
        net: The model that is trained; starts as `context.new_model()`.
        experience: The one that is being learned.
        epoch: Counted from 0 within the experience.
        step: Counted from 0 within the epoch.
    """

    experience: DataExperience

    def __init__(self, config: C, context: RunContext) -> None:
        self.config = config
        self.context = context
        self.net: Model = context.new_model()
        self.epoch = 0
        self.step = 0
        self._learning = False  # True in the middle of an experience
        self._loss_sum = torch.zeros((), device=context.device)
        self._order = torch.zeros(0, dtype=torch.int64)  # of this epoch
        self._optimizer: torch.optim.Optimizer | None = None
        self._updated: list[nn.Parameter] = []  # what the optimizer holds
        self._constructed: frozenset[str] | None = None
        self._may_fuse = False
        self._is_fusing = False  # True within a loss that may
        self._fused: FusedHeads | None = None

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The scalar to minimize on a batch."""

    def before_experience(self, experience: DataExperience) -> None:
        """Called once, before the first epoch. New heads made here are trained with the model."""

    def before_epoch(self, epoch: int) -> None:
        """Called before each epoch."""

    def after_step(self, batch: Batch) -> None:
        """Called after each optimizer step. Whether `grad` was clipped in place is up to the optimizer."""

    def after_experience(self, experience: DataExperience) -> None:
        """Called once, after the last epoch."""

    def model(self) -> nn.Module:
        """The model to evaluate."""
        return self.net

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimizer updates: every parameter held as an attribute or in a module that is one, unless it is frozen."""
        seen: set[int] = set()  # two attributes may hold one module
        for value in vars(self).values():
            held = value.parameters() if isinstance(value, nn.Module) else [value] if isinstance(value, nn.Parameter) else []
            for parameter in held:
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.context.device

    @property
    def recipe(self) -> Recipe:
        """The stream's recipe."""
        return self.context.recipe

    def features(self, x: Tensor) -> Tensor:
        """(B, D) features of (B, ...) float32 inputs."""
        return self.net.features(x)

    def logits(self, batch: Batch) -> Tensor:
        """(B, C) logits, each sample's by the head of its own task."""
        fused = self._fused_heads(batch.task) if self._is_fusing else None
        if fused is not None:
            return fused(self.features(batch.x), batch.task)
        return self.net(batch.x, batch.task)  # type: ignore[no-any-return]

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh generator for this purpose at this step of this epoch of this experience."""
        return self.context.generator(purpose, self.experience.index, self.epoch, self.step)

    def stored(self, batch: Batch) -> Tensor:
        """(B, ...) inputs of a batch as the experience stores them, before augmentation: what goes into a buffer."""
        return self.experience.train.x.index_select(0, batch.index.cpu())

    def replayed(self, memory: Memory, purpose: str = "replay") -> Batch:
        """What a buffer gave as a batch, augmented as the recipe says; `index` is the slot of the buffer."""
        inputs = augment(as_float(memory.x), self.recipe.augment, self.generator(f"augment {purpose}"))
        return Batch(*(tensor.to(self.device) for tensor in (inputs, memory.y, memory.index, memory.task)))

    def order(self, experience: DataExperience, generator: torch.Generator) -> Tensor:
        """(N,) int64, the order in which an epoch visits the training set; override to sample otherwise, at the same length."""
        return torch.randperm(len(experience.train), generator=generator)

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Train for the recipe's epochs; goes on in the middle after `load`."""
        if self._constructed is None:
            self._constructed = frozenset(self._objects())
        self.experience = experience
        with self.context.global_rng("training", experience.index):
            if not self._learning:
                self.epoch = self.step = 0
                self.before_experience(experience)
                self._learning = True
                self._prepare_optimizer()
            for epoch in range(self.epoch, self.recipe.epochs):
                self._learn_epoch(experience, epoch)
            self._learning = False
            if self._fused is not None:
                self._fused.separate()
                self._fused = None
            self.after_experience(experience)
        batches = math.ceil(len(experience.train) / self.recipe.batch_size)
        return {"loss": float(self._loss_sum) / batches}

    def _learn_epoch(self, experience: DataExperience, epoch: int) -> None:
        self.epoch = epoch
        if self.step == 0:
            self._loss_sum = torch.zeros((), device=self.device)
            self.context.seed_global("epoch", experience.index, epoch)
            self.before_epoch(epoch)
        for module in vars(self).values():
            if isinstance(module, nn.Module) and any(parameter.requires_grad for parameter in module.parameters()):
                module.train()
        if self.step == 0:
            # Kept for checkpoints: what an order of one's own depends on may have changed in the middle of the epoch.
            self._order = self.order(experience, self.context.generator("order", experience.index, epoch))
        batches = self._order.split(self.recipe.batch_size)
        for step in range(self.step, len(batches)):
            self.step = step
            self._learn_batch(experience, batches[step], epoch * len(batches) + step, self.recipe.epochs * len(batches))
            self.step = step + 1
            self.context.tick(self.state)
        if not math.isfinite(float(self._loss_sum)):
            raise NotFiniteError(f"expected a finite loss, got {float(self._loss_sum)} in epoch {epoch}")
        self.step = 0

    def _learn_batch(self, experience: DataExperience, index: Tensor, done: int, total: int) -> None:
        optimizer = self._optimizer
        assert optimizer is not None
        self.context.seed_global("step", experience.index, done)
        inputs = experience.train.inputs(index)
        if self.recipe.augment != "none":
            inputs = augment(inputs, self.recipe.augment, self.generator("augment"))
        batch = Batch(inputs, experience.train.y[index], index, experience.tasks(index))
        if self.device.type != "cpu":
            batch = Batch(*(tensor.to(self.device) for tensor in (batch.x, batch.y, batch.index, batch.task)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, done, total)
        self._is_fusing = self._may_fuse
        if self.recipe.precision == "bfloat16":
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss = self.loss(batch)
        else:
            loss = self.loss(batch)
        self._is_fusing = False
        for parameter in self._updated:  # zero_grad without its bookkeeping
            parameter.grad = None
        if self._fused is not None:
            self._fused.drop_gradients()
        loss.backward()
        clip_and_step(optimizer, self.recipe.clip_norm, self._fused)
        self._loss_sum += loss.detach()
        self.context.cost.optimizer_steps += 1
        self.context.cost.samples_seen += len(index)
        self.after_step(batch)

    def state(self) -> State:
        """Every attribute, the position and the optimizer. Tensors are not copied: write it down before going on.

        Raises:
            TypeError: If an attribute holds what a checkpoint cannot; the message names it.
        """
        late = [path for path in self._objects() if self._constructed is not None and path not in self._constructed]
        if late:
            raise TypeError(f"attribute {late[0]!r}: make it in __init__, so that a checkpoint can be loaded into it")
        attributes: dict[str, Any] = {}
        modules: dict[int, str] = {}
        for name, value in vars(self).items():
            if name in _TRANSIENT:
                continue
            first = modules.setdefault(id(value), name) if isinstance(value, nn.Module) else name
            attributes[name] = encode(name, value) if first == name else {"is": "same", "value": first}
        optimizer = self._optimizer.state_dict() if self._optimizer is not None and self._learning else None
        return {"attributes": attributes, "optimizer": optimizer}

    def load(self, state: State) -> None:
        """Take up where `state` was taken."""
        for name in vars(self).keys() - state["attributes"].keys() - _TRANSIENT:
            delattr(self, name)
        for name, tagged in state["attributes"].items():
            if tagged["is"] == "same":
                setattr(self, name, getattr(self, tagged["value"]))
            else:
                setattr(self, name, decode(name, tagged, getattr(self, name, None), self.context))
        if state["optimizer"] is not None:
            self._prepare_optimizer().load_state_dict(state["optimizer"])

    def _prepare_optimizer(self) -> torch.optim.Optimizer:
        self._updated = list(self.parameters())
        self._optimizer = make_optimizer(self.recipe, self._updated)
        self._fused = None
        self._may_fuse = may_fuse(type(self)) and type(self.net) is Model and isinstance(self._optimizer, FlatSGD)
        return self._optimizer

    def _fused_heads(self, task: Tensor) -> FusedHeads | None:
        """The heads of these tasks in one, None where a batch has but one task or their heads had better stay apart."""
        tasks = sorted(set(task.tolist()))
        if len(tasks) == 1:
            return None
        if self._fused is not None and self._fused.is_intact:
            if tasks == self._fused.tasks:
                return self._fused
            if not set(tasks) > set(self._fused.tasks):
                return None  # a head that no sample asks for must not move
        self._fused = FusedHeads(self.net, tasks) if FusedHeads.suits(self.net, tasks) else None
        return self._fused

    def _objects(self) -> Iterator[str]:
        for name, value in vars(self).items():
            if name not in _TRANSIENT:
                yield from objects(name, value)


def joined(first: Batch, second: Batch) -> Batch:
    """Two batches as one; `index` no longer means anything."""
    return Batch(
        *(torch.cat([getattr(first, name), getattr(second, name)]) for name in ("x", "y", "index", "task")),
    )
