"""`shiftproof merge` from files to a file, against plain torch; what it refuses; how much memory it takes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from shiftproof.benchmark.cli.main import app

State = dict[str, Tensor]

# Loose methods, so that these tests hold whatever is installed.
METHODS = """
import os, signal
from dataclasses import dataclass
from typing import Annotated
from annotated_types import Ge
from shiftproof.benchmark import DataExperience, ExpertExperience, InputError, StrategySpec, hookimpl
from shiftproof.benchmark.merging.driver import mean
from shiftproof.strategies.merging.strategy import MergeStrategy

@dataclass(frozen=True)
class ScaleConfig:
    scale: Annotated[float, Ge(0)] = 1.0  # of the merged delta

@dataclass(frozen=True)
class LooksConfig(ScaleConfig):
    looks: bool = False  # at data

class Mean(MergeStrategy[ScaleConfig]):
    blockwise = True
    def merge(self, name, base, experts, facts):
        return base + self.config.scale * (mean(experts) - base)

class Whole(Mean):
    blockwise = False
    def path(self, name, shape):
        return "spectral" if len(shape) == 2 else "average"

class Few(Whole):
    "Has an answer for as many experts as the matrix has rows."
    def refusal(self, shapes, experts):
        few = {name: shape for name, shape in shapes.items() if len(shape) == 2 and shape[0] < experts}
        return f"expected few experts for {few}, got {experts}; drop some" if few else ""

class Norm(Mean):
    "Divides by the largest delta of all tensors."
    rounds = 1
    def scan(self, name, base, experts, facts):
        return max(float((expert - base).abs().max()) for expert in experts)
    def combine(self, partials, facts):
        return max(partials.values())
    def merge(self, name, base, experts, facts):
        return super().merge(name, base, experts, None) / facts

class Killed(Mean):
    def merge(self, name, base, experts, facts):
        if "bias" in name:
            os.kill(os.getpid(), signal.SIGKILL)
        return base.clone()

class Refusing(Mean):
    def merge(self, name, base, experts, facts):
        raise InputError(f"expected something else, got {name!r}")

class Stopped(Mean):
    def merge(self, name, base, experts, facts):
        raise KeyboardInterrupt

class Reference:
    def __init__(self, config, context):
        self.base = context.new_model()

def spec(name, build, **facts):
    config, consumes = facts.pop("config", ScaleConfig), facts.pop("consumes", ExpertExperience)
    return StrategySpec(name, build, config, consumes, "Me, 2026", **facts)

@hookimpl
def shiftproof_strategies():
    return [
        spec("mean", Mean, presets={"half": ScaleConfig(0.5)}), spec("whole", Whole), spec("few", Few), spec("norm", Norm),
        spec("killed", Killed), spec("refusing", Refusing), spec("stopped", Stopped), spec("reference", Reference),
        spec("fisher-toy", Mean, needs_data=True), spec("absent-merge", Mean, unavailable="needs shiftproof[clip]"),
        spec("learner", Mean, consumes=DataExperience), spec("looking", Mean, config=LooksConfig, data_knob="looks"),
    ]
"""

# The largest resident set since this program began, in MiB, after the command has ended. What getrusage tells would begin with
# that of the process which started this one, and that is larger.
PROBE = """
import re, sys
from pathlib import Path
from shiftproof.benchmark.cli.main import main
try:
    main()
finally:
    kilobytes = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    print(kilobytes / 1024, *sorted(set(m.split(".")[0] for m in sys.modules)))
"""
HEAVY = {"faiss", "sklearn", "avalanche", "torchvision", "matplotlib", "tensorboard", "wilds"}


@pytest.fixture
def plugin(tmp_path: Path, toy: Path) -> Path:
    file = tmp_path / "methods.py"
    file.write_text(METHODS)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    return made


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    """The one line on standard error of a merge that ends with 2 and prints nothing else."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: expected ") or ": expected " in line
    return str(line)


def options(plugin: Path, files: Sequence[Path], out: Path) -> list[str | Path]:
    experts = [part for file in files[1:] for part in ("--expert", file)]
    return ["--plugin", plugin, "--base", files[0], *experts, "--out", out]


def state(seed: int, dtype: torch.dtype = torch.float32, side: int = 20) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (side, side), "bias": (side,), "kernel": (4, 3, 3, 3)}
    made = {name: torch.rand(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**made, "counter": torch.tensor(seed)}


def save(folder: Path, states: Sequence[State], suffix: str = ".safetensors") -> list[Path]:
    files = [folder / f"{'base' if position == 0 else f'e{position}'}{suffix}" for position in range(len(states))]
    for file, tensors in zip(files, states, strict=True):
        if suffix == ".safetensors":
            save_file(tensors, file, {"format": "pt", "who": file.stem})
        else:
            torch.save(tensors, file)
    return files


def averaged(states: Sequence[State], name: str) -> Tensor:
    """What plain torch gives."""
    if not states[0][name].is_floating_point():
        return states[0][name]
    return torch.stack([tensors[name].float() for tensors in states[1:]]).mean(0).to(states[0][name].dtype)


def check_averaged(out: Path, states: Sequence[State]) -> None:
    found = load_file(out)
    assert set(found) == set(states[0])
    for name, tensor in found.items():
        assert tensor.dtype == states[0][name].dtype
        torch.testing.assert_close(tensor, averaged(states, name), rtol=1e-2 if tensor.itemsize == 2 else 1e-5, atol=1e-6)


def recipe(out: Path) -> dict[str, Any]:
    with safe_open(out, "pt") as opened:
        return dict(json.loads(opened.metadata()["shiftproof.merge"]))


def child(*arguments: str | Path, code: str = PROBE, **facts: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, "merge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **facts)


def architecture(name: str) -> nn.Module:
    from torchvision.models import VisionTransformer, resnet18

    made: dict[str, Callable[[], nn.Module]] = {
        "resnet18": lambda: resnet18(weights=None),
        "vit": lambda: VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10),
    }
    return made[name]()


@pytest.mark.parametrize("method", ["mean", "whole"])
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_a_real_model_is_averaged_as_plain_torch_does_it(plugin: Path, folder: Path, name: str, method: str) -> None:
    states: list[State] = []
    for _ in range(4):
        model = architecture(name)
        for buffer, value in model.state_dict().items():
            if "running" in buffer:
                value.uniform_(0.5, 1.5)
        states.append(model.state_dict())
    files, out = save(folder, states), folder / "out.safetensors"
    result = call(method, *options(plugin, files, out))
    assert result.exit_code == 0, result.stderr
    check_averaged(out, states)
    model = architecture(name)
    model.load_state_dict(load_file(out))
    assert torch.isfinite(model.eval()(torch.rand(1, 3, 32, 32))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_output_keeps_the_dtype(plugin: Path, folder: Path, dtype: torch.dtype) -> None:
    states = [state(seed, dtype) for seed in range(3)]
    out = folder / "out.safetensors"
    assert call("mean", *options(plugin, save(folder, states), out)).exit_code == 0
    check_averaged(out, states)


def test_the_metadata_hold_the_bases_and_the_recipe_without_paths(plugin: Path, folder: Path) -> None:
    files, out = save(folder, [state(seed) for seed in range(3)]), folder / "out.safetensors"
    assert call("mean@half", *options(plugin, files, out), "--set", "scale=0.25", "--dtype", "float64").exit_code == 0
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["who"]) == ("pt", "base")
    found = json.loads(metadata["shiftproof.merge"])
    hashes = [{"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files]
    assert found.pop("code_sha256").isalnum()
    assert found.pop("shiftproof")
    assert found == {
        "method": "mean",
        "preset": "half",
        "config": {"scale": 0.25},
        "device": "cpu",
        "dtype": "float64",
        "base": [hashes[0]],
        "experts": [[hashes[1]], [hashes[2]]],
    }
    assert str(folder) not in metadata["shiftproof.merge"]


def test_the_table_counts_tensors_and_parameters_by_rule(plugin: Path, folder: Path) -> None:
    states = [state(seed) for seed in range(3)]
    for tensors in states[1:]:
        tensors["bias"] = states[0]["bias"]
    result = call("whole", *options(plugin, save(folder, states), folder / "out.safetensors"))
    assert [line.split()[:4] for line in result.stdout.splitlines()[2:6]] == [
        ["spectral", "1", "400", "75.6%"],
        ["average", "1", "108", "20.4%"],
        ["unchanged", "1", "20", "3.8%"],
        ["copied", "1", "1", "0.2%"],
    ]
    assert "no expert differs from the base" in result.stdout
    assert result.stdout.splitlines()[3].endswith("4-dimensional")
    assert result.stdout.splitlines()[-1] == f"wrote: {folder / 'out.safetensors'}"


def test_jobs_and_a_second_run_change_no_byte(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed) for seed in range(4)])
    outs = [folder / f"{name}.safetensors" for name in ("one", "three", "again")]
    for out, jobs in zip(outs, "131", strict=True):
        assert call("norm", *options(plugin, files, out), "--jobs", jobs).exit_code == 0
    assert len({out.read_bytes() for out in outs}) == 1


def test_passes_over_all_tensors_come_before_the_merge(plugin: Path, folder: Path) -> None:
    states = [state(seed) for seed in range(3)]
    out = folder / "out.safetensors"
    assert call("norm", *options(plugin, save(folder, states), out)).exit_code == 0
    own = [name for name in states[0] if name != "counter"]
    largest = max(float((tensors[name] - states[0][name]).abs().max()) for tensors in states[1:] for name in own)
    torch.testing.assert_close(load_file(out)["weight"], averaged(states, "weight") / largest)


def test_formats_may_be_mixed_and_wrappers_are_told(plugin: Path, folder: Path) -> None:
    states = [state(seed) for seed in range(4)]
    files = save(folder, states)
    wrapped, legacy = folder / "e2.pt", folder / "e3.bin"
    torch.save({"state_dict": states[2], "epoch": 7}, wrapped)
    torch.save(states[3], legacy, _use_new_zipfile_serialization=False)
    out = folder / "out.safetensors"
    result = call("mean", *options(plugin, [files[0], files[1], wrapped, legacy], out))
    assert result.exit_code == 0, result.stderr
    check_averaged(out, states)
    assert f"{wrapped}: took the tensors under 'state_dict'" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("skipped")]
    assert line.endswith(f"beside 'state_dict' in {wrapped}: epoch")


def test_a_pytorch_base_gives_a_safetensors_file(plugin: Path, folder: Path) -> None:
    states = [state(seed) for seed in range(3)]
    out = folder / "out.safetensors"
    assert call("mean", *options(plugin, save(folder, states, ".pt"), out)).exit_code == 0
    check_averaged(out, states)
    assert [len(one["sha256"]) for one in recipe(out)["base"]] == [64]


def shard(folder: Path, tensors: State) -> Path:
    folder.mkdir()
    parts = {"model-1.safetensors": ("weight", "counter"), "model-2.safetensors": ("bias", "kernel")}
    for name, held in parts.items():
        save_file({key: tensors[key] for key in held}, folder / name, {"format": "pt"})
    where = {key: name for name, held in parts.items() for key in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_sharded_base_gives_the_same_shards_or_one_file(plugin: Path, folder: Path) -> None:
    states = [state(seed) for seed in range(3)]
    base, files = shard(folder / "sharded", states[0]), save(folder, states)
    for out in (folder / "out", folder / "out.safetensors"):
        assert call("mean", *options(plugin, [base, *files[1:]], out)).exit_code == 0
    check_averaged(folder / "out.safetensors", states)
    found = json.loads((folder / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert found == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in found.items():
        torch.testing.assert_close(load_file(folder / "out" / file)[name], averaged(states, name))
    assert [one["name"] for one in recipe(folder / "out" / "model-2.safetensors")["base"]] == sorted(set(found.values()))
    # What was written is an input again.
    again = call("mean", *options(plugin, [folder / "out", *files[1:]], folder / "again"), "--dry-run")
    assert again.exit_code == 0, again.stderr


def test_a_dry_run_tells_rules_and_cost_and_writes_nothing(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed) for seed in range(3)])
    before = sorted(folder.iterdir())
    result = call("norm", *options(plugin, files, folder / "out.safetensors"), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert [line.split()[:3] for line in result.stdout.splitlines()[2:4]] == [["elementwise", "3", "528"], ["copied", "1", "1"]]
    # Twice three models of 528 float32, and the counter of the base.
    assert f"passes: 2, {(2 * 3 * 528 * 4 + 8) / 1000:.3g} kB to read" in result.stdout
    assert f"output: {(528 * 4 + 8) / 1000:.3g} kB" in result.stdout
    assert sorted(folder.iterdir()) == before


def test_force_replaces_what_exists(plugin: Path, folder: Path) -> None:
    states = [state(seed) for seed in range(3)]
    files, out = save(folder, states), folder / "out.safetensors"
    out.write_text("old")
    assert refused("mean", *options(plugin, files, out)).endswith("which exists; give --force to replace it")
    assert out.read_text() == "old"
    assert call("mean", *options(plugin, files, out), "--force").exit_code == 0
    check_averaged(out, states)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("meen", "expected the name of a strategy, got 'meen'; did you mean 'mean'?"),
        ("mean@full", "expected the name of a preset of mean, got 'full'"),
        ("fisher-toy", "got 'fisher-toy', which needs data; `shiftproof run` runs it on a stream"),
        ("learner", "got 'learner', which learns from data"),
        ("reference", "got 'reference', which does not"),
        ("absent-merge", "got 'absent-merge': needs shiftproof[clip]"),
        ("refusing", "expected something else, got "),
    ],
)
def test_a_method_that_cannot_merge_is_refused(plugin: Path, folder: Path, method: str, message: str) -> None:
    files = save(folder, [state(seed) for seed in range(3)])
    before = sorted(folder.iterdir())
    assert message in refused(method, *options(plugin, files, folder / "out.safetensors"))
    assert sorted(folder.iterdir()) == before


def test_a_method_that_was_told_to_look_at_data_is_refused(plugin: Path, folder: Path) -> None:
    given = options(plugin, save(folder, [state(seed) for seed in range(3)]), folder / "out.safetensors")
    assert "got 'looking' with looks, which needs data; `shiftproof run`" in refused("looking", *given, "--set", "looks=true")
    assert call("looking", *given).exit_code == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--set", "scale=-1"), "mean.scale: expected float >= 0, got '-1'"),
        (("--set", "scal=1"), "got 'scal'; did you mean 'scale'?"),
        (("--jobs", "0"), "expected --jobs of 1 or more, got 0"),
        (("--device", "gpu"), "expected --device as one of auto, cpu, cuda, got 'gpu'"),
        (("--dtype", "float23"), "expected --dtype as one of auto, float32, float64, got 'float23'"),
    ],
)
def test_a_wrong_option_is_refused(plugin: Path, folder: Path, extra: tuple[str, ...], message: str) -> None:
    files = save(folder, [state(seed) for seed in range(3)])
    assert message in refused("mean", *options(plugin, files, folder / "out.safetensors"), *extra)


def drop(name: str) -> Callable[[State], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[State], Any]:
    return lambda tensors: tensors.update({name: tensor})


def spoil(name: str, value: float) -> Callable[[State], Any]:
    return lambda tensors: tensors[name].view(-1)[1].fill_(value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("bias"), "got those without 'bias'"),
        (put("extra", torch.ones(1)), "got those with 'extra'"),
        (put("bias", torch.ones(7)), "expected every shape as in {base}, got 'bias' (7,) for (20,)"),
        (put("bias", torch.ones(20).half()), "expected every dtype as in {base}, got 'bias' float16 for float32"),
        (spoil("kernel", float("nan")), "got NaN or infinity in 'kernel' of {e2}"),
        (spoil("weight", float("inf")), "got NaN or infinity in 'weight' of {e2}"),
        (lambda tensors: tensors.update(state(0)), "{e2}: expected an expert that differs from {base}"),
    ],
)
def test_a_wrong_expert_is_refused_by_name(plugin: Path, folder: Path, edit: Callable[[State], Any], message: str) -> None:
    states = [state(seed) for seed in range(3)]
    edit(states[2])
    files = save(folder, states)
    before = sorted(folder.iterdir())
    named = {file.stem: file for file in files}
    assert message.format(**named) in refused("mean", *options(plugin, files, folder / "out.safetensors"))
    assert sorted(folder.iterdir()) == before


def test_one_expert_is_too_few(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed) for seed in range(2)])
    message = "expected two experts or more, got 1; give --expert once for each"
    assert message in refused("mean", *options(plugin, files, folder / "out.safetensors"))


def test_more_experts_than_the_method_has_an_answer_for_are_refused(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed, side=3) for seed in range(6)])
    message = "expected few experts for {'weight': (3, 3)}, got 5; drop some"
    assert message in refused("few", *options(plugin, files, folder / "out.safetensors"))
    assert call("few", *options(plugin, files[:4], folder / "out.safetensors")).exit_code == 0


def test_a_small_matrix_that_no_expert_has_changed_is_no_obstacle(plugin: Path, folder: Path) -> None:
    row = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    states = [{**state(seed), "type": row} for seed in range(3)]
    files, out = save(folder, states), folder / "out.safetensors"
    assert call("few", *options(plugin, files, out)).exit_code == 0
    assert torch.equal(load_file(out)["type"], row)
    states[2]["type"] = row + 1
    line = refused("few", *options(plugin, save(folder, states), out), "--force")
    assert "expected few experts for {'type': (1, 16)}, got 2; drop some" in line


class Harmful:
    """Runs a command when it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def test_a_pickle_that_would_run_code_is_refused(plugin: Path, folder: Path) -> None:
    files, trace = save(folder, [state(seed) for seed in range(3)]), folder / "trace"
    harmful = folder / "e2.pt"
    torch.save({"weight": Harmful(trace)}, harmful)
    line = refused("mean", *options(plugin, [*files[:2], harmful], folder / "out.safetensors"))
    assert "e2.pt: expected tensors alone, got a pickle that would run" in line
    assert not trace.exists()


def test_files_that_are_missing_cut_short_or_the_output_are_refused(plugin: Path, folder: Path) -> None:
    files, out = save(folder, [state(seed) for seed in range(3)]), folder / "out.safetensors"
    assert "got no such file" in refused("mean", *options(plugin, [*files, folder / "e9.safetensors"], out))
    assert "expected one *.safetensors.index.json in the folder" in refused("mean", *options(plugin, [folder, *files], out))
    assert "which is one of them" in refused("mean", *options(plugin, files, files[1]), "--force")
    files[2].write_bytes(files[2].read_bytes()[:-1])
    assert f"error: {files[2]}: expected a complete safetensors file" in refused("mean", *options(plugin, files, out))


def test_a_stop_from_the_keyboard_writes_nothing(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed) for seed in range(3)])
    before = sorted(folder.iterdir())
    result = call("stopped", *options(plugin, files, folder / "out.safetensors"))
    assert (result.exit_code, result.stderr) == (130, "stopped; nothing was written\n")
    assert sorted(folder.iterdir()) == before


def test_a_killed_merge_leaves_nothing_under_the_name(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed) for seed in range(3)])
    before = set(folder.iterdir())
    assert child("killed", *options(plugin, files, folder / "out.safetensors")).returncode == -9
    # A file system without nameless files keeps a hidden one.
    assert all(path.name.startswith(".out.safetensors.") for path in set(folder.iterdir()) - before)


def test_a_full_disk_is_one_line_and_leaves_nothing(plugin: Path, folder: Path) -> None:
    files = save(folder, [state(seed) for seed in range(3)])
    before = sorted(folder.iterdir())
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        + PROBE.split("finally")[0]
        + "finally: pass"
    )
    done = child("mean", *options(plugin, files, folder / "out.safetensors"), code=code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: expected to write out.safetensors into {folder}, got: File too large; " + (
        "free space or choose another folder\n"
    )
    assert sorted(folder.iterdir()) == before


def test_memory_holds_a_few_tensors_and_never_all_models_and_imports_are_few(plugin: Path, folder: Path) -> None:
    """Models of 32 MiB in 16 tensors of 2 MiB; eight experts and the base are 288 MiB."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer-{position}" for position in range(16)]
    states = [{name: torch.rand(1 << 19, generator=generator) for name in names} for _ in range(9)]
    files = save(folder, states)
    del states
    used, modules = {}, set()
    for method, experts in (("mean", 2), ("mean", 4), ("mean", 8), ("whole", 8)):
        out = folder / f"{method}-{experts}.safetensors"
        done = child(method, *options(plugin, files[: experts + 1], out), "--jobs", "2")
        assert done.returncode == 0, done.stderr
        rss, *imported = done.stdout.splitlines()[-1].split()
        used[method, experts] = float(rss)
        modules |= set(imported)
    assert used["mean", 4] - used["mean", 2] < 16
    assert used["mean", 8] - used["mean", 2] < 32
    # Two threads with one tensor of each of nine models are 36 MiB.
    assert used["whole", 8] - used["mean", 2] < 100
    assert not modules & HEAVY
