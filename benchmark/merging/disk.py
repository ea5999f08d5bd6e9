"""A merge from disk to disk: what it will do and cost, and doing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.merging.checkpoints import Checkpoint
from shiftproof.benchmark.merging.driver import IN_FLIGHT, RUN, Merging, Rule, TensorRow
from shiftproof.benchmark.merging.inputs import Located
from shiftproof.benchmark.merging.method import MergeMethod
from shiftproof.benchmark.merging.sources import count
from shiftproof.benchmark.merging.writing import Output
from shiftproof.benchmark.records import canonical

UNKNOWN = "0" * 64  # holds the place of a hash until it is known


@dataclass(frozen=True)
class Made:
    """How a merge is made: what the recipe in the file's metadata says beside the inputs.

    Attributes:
        config: The resolved knobs, a dataclass.
        code_sha256: Of the method's code.
        dtype: What it computes in: "float32", "float64" or "auto".
    """

    method: str
    preset: str
    config: Any
    code_sha256: str
    device: str = "cpu"
    dtype: str = "auto"

    def recipe(self, inputs: Sequence[Located], sha256: Mapping[Path, str]) -> str:
        """Canonical JSON, without a path; of the same length whatever the hashes are."""
        base, *experts = ([{"name": file.name, "sha256": sha256.get(file, UNKNOWN)} for file in item.files] for item in inputs)
        facts = {**asdict(self), "config": asdict(self.config), "shiftproof": version("shiftproof")}
        return canonical({**facts, "base": base, "experts": experts})


@dataclass(frozen=True)
class Cost:
    """What a merge takes.

    Attributes:
        read: Bytes, over all passes; the hashes read the inputs once more.
        written: Bytes.
        passes: Over the tensors, the merge included.
        memory: Bytes of base and experts that are held at a time, beside what the method needs for itself.
    """

    read: int
    written: int
    passes: int
    memory: int


def check_refusals(merging: Merging) -> None:
    """Raises InputError where the method has no answer for the shapes of tensors that change, and so many experts."""
    base = merging.base
    refused: dict[str, Sequence[int]] = {}
    for name in base.names():
        shape = {name: base.shape(name)}
        if not merging.rule(name)[1] and merging.method.refusal(shape, len(merging.experts)) and _is_changed(merging, name):
            refused |= shape
    if refused:
        raise InputError(merging.method.refusal(refused, len(merging.experts)))


def _is_changed(merging: Merging, name: str) -> bool:
    base = merging.base.read(name)
    return not all(torch.equal(base, expert.read(name)) for expert in merging.experts)


def cost_of(merging: Merging, base: Checkpoint) -> Cost:
    """What a merge will take, told from shapes alone: tensors that no expert changed are not known yet."""
    names = base.names()
    models = 1 + len(merging.experts)
    own = sum(base.nbytes(name) for name in names if not merging.rule(name)[1])
    copied = sum(base.nbytes(name) for name in names if merging.rule(name)[0] == "copied")
    written = sum(base.nbytes(name) for name in names)
    held = sorted((merging.held(name, RUN if merging.method.rounds else merging.run_of_merge) for name in names), reverse=True)
    most = max(held[0], min(sum(held[: merging.jobs]), IN_FLIGHT))
    read = own * merging.method.rounds * models + (written - copied) * models + copied
    return Cost(read, written, merging.method.rounds + 1, most)


def planned(merging: Merging) -> list[TensorRow]:
    """What would be done with each tensor; whether experts differ from the base in it is not looked at."""
    return [TensorRow(name, merging.base.shape(name), *merging.rule(name)) for name in merging.base.names()]


def reason(method: MergeMethod, row: TensorRow) -> str:
    """Why a tensor was not merged as the method's matrices are: for what it is, for its name, or for its shape."""
    if row.why or row.rule != "average" or method.path("", (8, 8)) != "spectral":
        return row.why
    return "excluded by name" if method.path("", row.shape) == "spectral" else f"{len(row.shape)}-dimensional"


def summary(rows: Sequence[TensorRow], method: MergeMethod) -> list[tuple[str, str, int, int]]:
    """Rule, why, tensors and parameters, the rule with most parameters first."""
    tensors: Counter[tuple[Rule, str]] = Counter()
    parameters: Counter[tuple[Rule, str]] = Counter()
    for row in rows:
        key = row.rule, reason(method, row)
        tensors[key] += 1
        parameters[key] += count(row.shape)
    return [(*key, tensors[key], elements) for key, elements in parameters.most_common()]


def merge_files(
    merging: Merging,
    checkpoints: Sequence[Checkpoint],
    out: Path,
    made: Made,
    hashes: Callable[[], Mapping[Path, str]],
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[TensorRow], list[Path]]:
    """Merge checkpoints into `out`, tensor by tensor.

    Args:
        checkpoints: The base and the experts of `merging`.
        hashes: SHA-256 of the inputs' files; asked for when everything else is done.

    Returns:
        A row a tensor, and the files that were written.

    Raises:
        InputError: If a tensor is not finite.
        OutputError: If the output cannot be written; nothing is left of it.
    """
    inputs = [checkpoint.located for checkpoint in checkpoints]
    with Output(out, checkpoints[0], made.recipe(inputs, {}), force) as output:
        rows = merging.run(output.write, progress, output.write_part)
        files = output.commit(made.recipe(inputs, hashes()))
    return rows, files
