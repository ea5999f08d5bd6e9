"""A loose plugin for tests of the harness: small planted streams, and strategies that go wrong in every way there is."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark import (
    ArrayData,
    BaseRecipe,
    Batch,
    DataExperience,
    EvalSet,
    GroupedExperience,
    JointExperience,
    Recipe,
    RunContext,
    Scenario,
    StrategySpec,
    Stream,
    StreamSpec,
    hookimpl,
    sequential,
)
from shiftproof.strategies import TrainingStrategy

GROUPS = ("y0-z0", "y0-z1", "y1-z0", "y1-z1")


@dataclass(frozen=True)
class StreamConfig:
    """Knobs of the planted streams."""

    p_corr: Annotated[float, Ge(0.5), Le(1)] = 0.9  # share of training samples whose colour goes with the label
    samples: Annotated[int, Ge(8)] = 48  # of each training set


@dataclass(frozen=True)
class ToyConfig:
    """Knobs of the toys."""

    scale: Annotated[float, Ge(0)] = 1.0  # of the loss
    file: str = ""  # where some of them write to


def pictures(seed: int, count: int, p_corr: float) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 3, 8, 8) uint8 stripes whose direction is the label, (N,) int64 labels, (N,) int64 colours."""
    rng = np.random.Generator(np.random.PCG64(seed))
    y = np.arange(count) % 2
    z = np.where(np.arange(count) // 2 < p_corr * (count // 2), y, 1 - y)
    stripes = np.arange(8) // 2 % 2 * 150
    x = rng.integers(0, 60, (count, 3, 8, 8)) + np.where(y[:, None, None] == 1, stripes, stripes[:, None])[:, None]
    x[np.arange(count), z] += 45
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y), torch.from_numpy(z)


def planted(config: StreamConfig, root: str | None = None) -> Stream:
    """`tiny`: two biased binary tasks."""
    train, evals = [], []
    for task in (0, 1):
        x, y, z = pictures(task, config.samples, config.p_corr)
        train.append(GroupedExperience(task, f"task-{task}", task, ArrayData(x, y), 2 * y + z))
        x, y, z = pictures(10 + task, 40, 0.5)
        evals.append(EvalSet(f"task-{task}", ((task, ArrayData(x, y)),), 2 * y + z, GROUPS))
    return Stream(
        name="tiny",
        version="1",
        scenario=Scenario.TASK_INCREMENTAL,
        folds=sequential(train, evals),
        heads={0: 2, 1: 2},
        base=BaseRecipe(backbone="digits-cnn", kind="random"),
        recipe=Recipe(name="tiny", epochs=2, batch_size=16, lr=0.05),
        split_sha256="0" * 64,
        tier="digits",
        source="generated",
        licence="MIT",
    )


def last_only(config: StreamConfig, root: str | None = None) -> Stream:
    """`tiny-last`: the same, measured once, in an order that means nothing."""
    return replace(planted(config), name="tiny-last", scenario=Scenario.OFFLINE, evaluate="last")


def without_groups(config: StreamConfig, root: str | None = None) -> Stream:
    """`tiny-plain`: the same without group labels."""
    stream = planted(config)
    fold = stream.folds[0]
    plain = tuple(one.without_groups() for one in fold.train if isinstance(one, GroupedExperience))
    return replace(stream, name="tiny-plain", folds=(replace(fold, train=plain),))


class Toy(TrainingStrategy[ToyConfig]):
    """Cross-entropy; can be resumed."""

    def loss(self, batch: Batch) -> Tensor:
        """Scaled cross-entropy."""
        return self.config.scale * F.cross_entropy(self.logits(batch), batch.y)


class Plain:
    """A loop of its own that draws from torch's global generator; cannot be resumed."""

    def __init__(self, config: ToyConfig, context: RunContext) -> None:
        self.context = context
        self.net = context.new_model()
        self.config = config

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Plain SGD."""
        optimizer = torch.optim.SGD(self.net.parameters(), self.context.recipe.lr)
        loss = torch.zeros(())
        for _ in range(self.context.recipe.epochs):
            for index in torch.randperm(len(experience.train)).split(self.context.recipe.batch_size):
                loss = F.cross_entropy(self.net(experience.train.inputs(index), experience.task), experience.train.y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {"loss": float(loss.detach())}

    def model(self) -> nn.Module:
        """The net."""
        return self.net


class Counted(Plain):
    """Writes a line whenever it is run."""

    def __init__(self, config: ToyConfig, context: RunContext) -> None:
        super().__init__(config, context)
        with open(config.file, "a") as file:
            file.write(f"{context.seed} {os.getpid()}\n")


class NanLoss(Toy):
    """Diverges in the second experience."""

    def loss(self, batch: Batch) -> Tensor:
        """NaN from the second experience on."""
        return super().loss(batch) * (float("nan") if self.experience.index else 1.0)


class NanLogs(Plain):
    """Learns, and reports NaN."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """NaN as a number worth logging."""
        return {"loss": 0.5, "norm": float("nan")}


class NanLogits(Plain):
    """Answers NaN without having complained."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Spoil a head."""
        with torch.no_grad():
            self.net.head(experience.task).bias.fill_(float("nan"))
        return {}


class TensorLogs(Plain):
    """Reports tensors, numpy scalars and integers, as one does."""

    def learn(self, experience: DataExperience) -> Any:
        """Numbers of three kinds."""
        return {"loss": torch.tensor(0.5, requires_grad=True), "norm": np.float32(2), "steps": 3}


class Drawer(Plain):
    """Reports what the global generators give."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Draw."""
        return {"torch": float(torch.rand(())), "numpy": float(np.random.rand())}


class NoLogs(Plain):
    """Forgets to return anything."""

    def learn(self, experience: DataExperience) -> Any:
        """Nothing."""


class Crash(Toy):
    """Raises with a path and several lines in its message."""

    def after_experience(self, experience: DataExperience) -> None:
        """Fail."""
        raise FileNotFoundError(2, "No such file\nor directory", "/home/somebody/secret place/weights.pt")


class Quitter(Plain):
    """Leaves the interpreter."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Exit."""
        sys.exit("I quit")


class Canceller(Plain):
    """Raises what is no `Exception`."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Be cancelled."""
        raise asyncio.CancelledError("too late")


class Peeker(Toy):
    """Reads group labels without saying so."""

    def before_experience(self, experience: Any) -> None:
        """Look at them."""
        self.groups = experience.groups


class Grouped(Toy):
    """Reads group labels and says so; weights every group the same."""

    def before_experience(self, experience: Any) -> None:
        """Weights from the sizes of groups."""
        self.weight = 1 / experience.groups.bincount(minlength=4).clamp(min=1)[experience.groups].float()

    def loss(self, batch: Batch) -> Tensor:
        """Weighted cross-entropy."""
        losses = F.cross_entropy(self.logits(batch), batch.y, reduction="none")
        weight: Tensor = self.weight[batch.index]
        return (weight * losses).sum() / weight.sum()


class Scribbler(Plain):
    """Alters the training data where they lie."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Scribble, then learn."""
        experience.train.x.fill_(0)
        return super().learn(experience)


class LateScribbler(Plain):
    """Keeps the first experience and alters it, unseen by torch, while it learns the second."""

    first: DataExperience | None = None

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Learn, and scribble on what was learned before."""
        self.first = self.first or experience
        if experience.index:
            self.first.train.y.numpy()[:] = 0
        return super().learn(experience)


class Meddler(Plain):
    """Leaves settings of the whole process altered."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Alter them when it is done."""
        logs = super().learn(experience)
        if experience.index:
            self.net.double()  # or its own answers could not be had
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            torch.set_default_device("meta")
            torch.backends.mkldnn.set_flags(False, _fp32_precision=None)
            np.seterr(all="raise")
            os.environ["TOY"] = "left behind"
            os.chdir(Path(__file__).parent)
        return logs

    def model(self) -> nn.Module:
        """On the device where it lies, whatever the default is."""
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        return self.net.float()


class Careless(Plain):
    """Leaves global generators, threads and gradient mode altered, and draws them when the model is asked for."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Alter what is global."""
        logs = super().learn(experience)
        torch.manual_seed(1)
        np.random.seed(1)
        if experience.index:  # the last one: nothing of its own is slowed down
            torch.set_num_threads(torch.get_num_threads() + 1)
        return logs

    def model(self) -> nn.Module:
        """A net with noise in its last layer."""
        with torch.no_grad():
            for task in (0, 1):
                self.net.head(task).bias.add_(torch.randn(2))
        return self.net


class Killed(Plain):
    """Dies as if the machine were out of memory."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """SIGKILL."""
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


class Lingerer(Plain):
    """Leaves a thread running for a minute."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Start it, then learn."""
        threading.Thread(target=time.sleep, args=(60,)).start()
        return super().learn(experience)


class Sleeper(Plain):
    """Says which process it is in, and sleeps for a minute."""

    def learn(self, experience: DataExperience) -> Mapping[str, float]:
        """Sleep."""
        Path(self.config.file).write_text(str(os.getpid()))
        time.sleep(60)
        return {}


@hookimpl
def shiftproof_strategies() -> list[StrategySpec[Any]]:
    """The toys."""
    toys: dict[str, type[Any]] = {
        "toy": Toy,
        "plain": Plain,
        "counted": Counted,
        "nan-loss": NanLoss,
        "nan-logs": NanLogs,
        "nan-logits": NanLogits,
        "tensor-logs": TensorLogs,
        "drawer": Drawer,
        "no-logs": NoLogs,
        "crash": Crash,
        "quitter": Quitter,
        "canceller": Canceller,
        "peeker": Peeker,
        "scribbler": Scribbler,
        "late-scribbler": LateScribbler,
        "meddler": Meddler,
        "careless": Careless,
        "killed": Killed,
        "lingerer": Lingerer,
        "sleeper": Sleeper,
    }
    reference = "Toy et al., Journal of Toys, 2024"
    specs = [StrategySpec(name, kind, ToyConfig, DataExperience, reference) for name, kind in toys.items()]
    return [
        *specs,
        StrategySpec("grouped", Grouped, ToyConfig, GroupedExperience, reference, uses_group_labels=True),
        StrategySpec("union", Toy, ToyConfig, JointExperience, reference, presets={"half": ToyConfig(scale=0.5)}),
        StrategySpec("missing", Toy, ToyConfig, DataExperience, reference, unavailable="needs shiftproof[clip]"),
    ]


@hookimpl
def shiftproof_streams() -> list[StreamSpec[Any]]:
    """The planted streams."""
    builds = {"tiny": planted, "tiny-last": last_only, "tiny-plain": without_groups}
    return [
        StreamSpec(name, build, StreamConfig, "digits", "planted pictures", "generated", "MIT")
        for name, build in builds.items()
    ]
