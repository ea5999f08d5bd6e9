"""The conformance kit: what every strategy must do, tried on a small planted stream in seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import State, StrategySpec
from shiftproof.benchmark.experiences import ArrayData, EvalSet, GroupedExperience, TransportExperience
from shiftproof.benchmark.recipes import BaseRecipe, Recipe
from shiftproof.benchmark.records import RunRecord, RunRequest
from shiftproof.benchmark.registry.lookup import Registry, load_registry
from shiftproof.benchmark.running.cells import obstacle
from shiftproof.benchmark.running.runner import Cell, CellRun, experts_of, identify, run_cell
from shiftproof.benchmark.streams import Fold, Scenario, Stream, sequential

SAMPLES = 64  # of each experience
FINISHES = "finishes the planted stream"


@dataclass(frozen=True)
class CheckResult:
    """One check, and what was seen."""

    name: str
    passed: bool
    detail: str


class _Killed(BaseException):
    """Stands for SIGKILL: nothing between the strategy and the kit catches it."""


def check_strategy(label: str, files: Sequence[str | Path] = (), registry: Registry | None = None) -> list[CheckResult]:
    """Run the kit on an installed strategy, or on one from a loose file.

    Args:
        label: Name, or name@preset.
        files: Plugin files to load.
        registry: Instead of loading one.

    Raises:
        InputError: If there is no such strategy.
    """
    registry = registry or load_registry(files=[Path(file) for file in files])
    spec, _, _ = registry.strategy(label)
    reason = obstacle(registry, spec, stream_for(spec))
    if reason:
        return [CheckResult(FINISHES, False, reason)]
    with tempfile.TemporaryDirectory() as folder:
        return list(_checks(_Kit(label, registry, Path(folder))))


def stream_for(spec: StrategySpec[Any], permute_groups: bool = False) -> Stream:
    """The planted stream; for strategies that transport, its second task is carried to a new release of the base."""
    stream = planted_stream(permute_groups)
    if spec.consumes is not TransportExperience:
        return stream
    (whole,) = stream.folds
    fold = Fold(whole.name, (replace(whole.train[1], index=0),), whole.evals[1:])
    return replace(stream, scenario=Scenario.TRANSPORT, evaluate="last", folds=(fold,), release=replace(stream.base, seed=1))


def planted_stream(permute_groups: bool = False) -> Stream:
    """Two biased binary tasks of 64 small pictures: the label is in the texture, the latent attribute in the colour."""
    rng = np.random.Generator(np.random.PCG64(0))
    train, evals = [], []
    for task, name in enumerate(("stripes", "blocks")):
        x, y, z = _pictures(rng, task, SAMPLES, 0.9)
        groups = 2 * y + z
        if permute_groups:
            groups = groups[torch.from_numpy(np.random.Generator(np.random.PCG64(1)).permutation(SAMPLES))]
        train.append(GroupedExperience(task, name, task, ArrayData(x, y), groups))
        x, y, z = _pictures(rng, task, SAMPLES, 0.5)
        evals.append(EvalSet(name, ((task, ArrayData(x, y)),), 2 * y + z, ("y0-z0", "y0-z1", "y1-z0", "y1-z1")))
    return Stream(
        name="planted",
        version="1",
        scenario=Scenario.TASK_INCREMENTAL,
        folds=sequential(train, evals),
        heads={0: 2, 1: 2},
        base=BaseRecipe(backbone="digits-cnn", kind="random"),
        recipe=Recipe(name="conformance", epochs=2, batch_size=16, lr=0.05),
        split_sha256="0" * 64,
        tier="digits",
        source="generated",
        licence="MIT",
    )


def _pictures(
    rng: np.random.Generator, task: int, count: int, p_corr: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, 3, 16, 16) uint8, (N,) int64 labels and (N,) int64 colours."""
    y = np.arange(count) % 2
    z = np.where(rng.random(count) < p_corr, y, 1 - y)
    wave = (np.arange(16) // (2 + task)) % 2
    shape = np.where(y[:, None, None] == 1, wave[None, None, :], wave[None, :, None]) * 160  # stripes across or along
    x = rng.integers(0, 60, (count, 3, 16, 16)) + shape[:, None]
    x[np.arange(count), z] += 30
    return torch.from_numpy(x.astype(np.uint8)), torch.from_numpy(y.astype(np.int64)), torch.from_numpy(z.astype(np.int64))


class _Kit:
    """Runs one strategy on the planted stream."""

    def __init__(self, label: str, registry: Registry, folder: Path) -> None:
        self.label = label
        self.registry = registry
        self.folder = folder
        self.cache = Cache(folder / "cache")
        self.runs = 0
        self.spec, self.preset, self.config = registry.strategy(label)

    def cell(self, stream: Stream, seed: int = 0) -> Cell:
        request = RunRequest(self.spec.name, stream.name, seed, preset=self.preset)
        experts = experts_of(self.registry, self.spec, stream)
        return identify(request, self.spec, self.config, stream, {}, "cpu", experts)

    def run(self, stream: Stream, seed: int = 0) -> RunRecord:
        self.runs += 1
        return run_cell(self.cell(stream, seed), self.registry, self.folder / str(self.runs), self.cache)

    def run_interrupted(self, stream: Stream, after: int) -> tuple[RunRecord, bool]:
        """Killed at the checkpoint number `after`, then started again."""
        self.runs += 1
        out, cell = self.folder / str(self.runs), self.cell(stream)
        attempt = CellRun(cell, self.registry, out, self.cache, "cpu", 0.0)
        write, count = attempt.write_checkpoint, 0

        def write_and_die(state: State | None) -> None:
            nonlocal count
            write(state)
            count += 1
            if count == after:
                raise _Killed

        attempt.checkpointer.write = write_and_die
        killed = False
        try:
            attempt.results()
        except _Killed:
            killed = True
        return run_cell(cell, self.registry, out, self.cache), killed


def _checks(kit: _Kit) -> Iterator[CheckResult]:
    spec, stream = kit.spec, stream_for(kit.spec)
    yield CheckResult("has a reference", len(spec.reference) > 10, spec.reference)
    yield _attempt("presets are of the config's type", lambda: _presets(kit))
    record = kit.run(stream)
    if record.error is not None:
        yield CheckResult(FINISHES, False, f"{record.error['type']}: {record.error['message']}")
        return
    average = record.metrics["average"]["value"]
    told = f"average accuracy {100 * average:.1f} %, which is not judged: the run is too short to learn much, chance is 50 %"
    yield CheckResult(FINISHES, True, f"losses and logits finite; {told}")
    kit.run(stream, seed=1)
    torch.rand(3)
    np.random.default_rng().random()
    again = kit.run(stream)
    yield _same("same seed, same result, with another cell in between", record, again)
    if record.identity["strategy"] and not spec.uses_group_labels:
        yield _same("true groups permuted, same result", record, kit.run(stream_for(spec, permute_groups=True)))
    resumed = [kit.run_interrupted(stream, after) for after in (1, 6, 11)]
    if not any(killed for _, killed in resumed):
        yield CheckResult("goes on after a kill", True, "no checkpoints: an interrupted cell starts again")
        return
    for after, (other, killed) in zip((1, 6, 11), resumed, strict=True):
        if killed:
            yield _same(f"goes on bit for bit after a kill at checkpoint {after}", record, other)


def _presets(kit: _Kit) -> str:
    for name, preset in kit.spec.presets.items():
        replace(preset)  # frozen dataclasses check themselves when they are made
        assert asdict(preset).keys() == asdict(kit.spec.config()).keys(), name
    return ", ".join(kit.spec.presets) or "none"


def _attempt(name: str, check: Callable[[], Any]) -> CheckResult:
    try:
        return CheckResult(name, True, str(check()))
    except Exception as error:  # a stranger's dataclass may raise anything; the kit reports it
        return CheckResult(name, False, f"{type(error).__name__}: {error}")


def _same(name: str, first: RunRecord, second: RunRecord) -> CheckResult:
    if second.error is not None:
        return CheckResult(name, False, f"{second.error['type']}: {second.error['message']}")
    same = first.results_sha256 == second.results_sha256 and first.logs == second.logs
    return CheckResult(name, same, "equal bit for bit" if same else "results differ")
