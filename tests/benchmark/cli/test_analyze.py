"""`shiftproof analyze` on checkpoints and on a planted stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from shiftproof.benchmark.cli.main import app

TOYS = Path(__file__).parents[2] / "toys.py"
State = dict[str, Tensor]


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line on standard error of a call that ends with 2 and prints nothing else."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return str(line)


def lines(*arguments: object) -> list[str]:
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    return list(result.stdout.splitlines())


@pytest.fixture
def states() -> dict[str, State]:
    """A base, and two experts that changed the first matrix in the same direction and the second in orthogonal ones."""
    base = {"enc.0": torch.ones(4, 4), "enc.1": torch.ones(4, 4), "frozen": torch.ones(3, 3), "bias": torch.ones(4)}
    experts = {name: {key: tensor.clone() for key, tensor in base.items()} for name in ("clipart", "sketch")}
    for place, expert in enumerate(experts.values()):
        expert["enc.0"][0, place] += 2
        expert["enc.1"][place, place] += 2
        expert["bias"] += place
    return {"base": base, **experts}


@pytest.fixture
def options(states: dict[str, State], tmp_path: Path) -> list[object]:
    """The options that name them as files."""
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    base, *experts = (tmp_path / f"{name}.safetensors" for name in states)
    return ["--base", base, *(part for expert in experts for part in ("--expert", expert))]


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Options for a planted stream of two tasks, with a transformer that takes a second to fine-tune."""
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", "fine-tuning")
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "cache"))
    knobs = ("recipe.epochs=1", "stream.samples=24")
    return ["--stream", "tiny", "--plugin", TOYS, "--device", "cpu", *(part for knob in knobs for part in ("--set", knob))]


def test_overlap_of_checkpoints_is_told_by_pairs_and_layers_and_what_nobody_changed_is_named(options: list[object]) -> None:
    said = [line.split() for line in lines("overlap", *options)]
    assert said[0] == ["mean", "SAR", "clipart", "sketch"]
    assert said[2] == ["clipart", "1.000", "0.500"]
    assert ["sketch", "0.785", "0.000"] in said
    assert ["enc.0", "4x4", "1", "1.000", "1.000", "1.000", "0.500", "0.000"] in said
    assert ["enc.1", "4x4", "1", "0.000", "0.000", "0.000", "0.500", "1.571"] in said
    assert said[-1] == ["skipped,", "since", "no", "expert", "changed", "them:", "frozen"]


def test_sigma_of_checkpoints_tells_orthogonal_changes_from_competing_ones(options: list[object]) -> None:
    said = [line.split() for line in lines("sigma", *options)]
    assert [row[0] for row in said[2:4]] == ["enc.1", "enc.0"]
    assert said[2][-2:] == ["100.0%", "0.0%"]
    assert said[3][-2:] == ["50.0%", "50.0%"]


@pytest.mark.parametrize("command", ["overlap", "sigma"])
def test_json_is_json_alone_and_the_folder_gets_it_with_pictures(command: str, options: list[object], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = call(command, *options, "--json", "--out", out, "--layers", "enc")
    content = json.loads(result.stdout)
    assert content["experts"] == ["clipart", "sketch"]
    assert [layer["name"] for layer in content["layers"]] == ["enc.0", "enc.1"]
    assert json.loads((out / f"{command}.json").read_text()) == content
    wrote = [Path(line.removeprefix("wrote: ")) for line in result.stderr.splitlines()]
    assert sorted(wrote) == sorted(out.iterdir())
    assert out / f"{command}.png" in wrote


def test_epsilon_and_the_released_rule_reach_the_record(options: list[object]) -> None:
    content = json.loads(call("overlap", *options, "--json", "--epsilon", "0.5", "--one-fewer").stdout)
    assert (content["epsilon"], content["one_fewer"]) == (0.5, True)


@pytest.mark.parametrize("command", ["overlap", "sigma"])
def test_wrong_checkpoints_are_one_line(command: str, options: list[object], states: dict[str, State], tmp_path: Path) -> None:
    assert "expected --base with --expert twice or more, or --stream, got neither" in refused(command)
    assert "got both; give one of them" in refused(command, *options, "--stream", "tiny")
    assert "expected --base and --expert twice or more, got 1 experts" in refused(command, *options[:4])
    assert "got 2 experts, no base" in refused(command, *options[2:])
    assert "expected --fold and --set with --stream alone" in refused(command, *options, "--fold", "a")
    assert "expected --layers as a part of the name of a matrix, got 'dec'; there are enc.0" in refused(
        command, *options, "--layers", "dec"
    )
    assert "clipart.safetensors: expected an expert that differs" in refused(command, "--base", options[3], *options[2:])
    assert "clipart: expected an expert that differs from the base in the chosen matrices" in only_bias(
        command, states, tmp_path
    )
    assert "expected a checkpoint in nowhere.pt, got no such file" in refused(command, *options, "--expert", "nowhere.pt")
    save_file(states["base"] | {"enc.0": torch.ones(2, 8)}, tmp_path / "odd.safetensors")
    assert "expected every shape as in" in refused(command, *options, "--expert", tmp_path / "odd.safetensors")


def only_bias(command: str, states: dict[str, State], folder: Path) -> str:
    """What is said of an expert that changed a vector and no matrix."""
    save_file(states["base"] | {"bias": torch.zeros(4)}, folder / "clipart.safetensors")
    files = [folder / f"{name}.safetensors" for name in states]
    return refused(command, "--base", files[0], "--expert", files[1], "--expert", files[2])


def test_an_epsilon_that_is_no_part_is_one_line(options: list[object]) -> None:
    assert "expected an epsilon above 0 and below 1, got 1.0" in refused("overlap", *options, "--epsilon", 1)


@pytest.mark.parametrize("command", ["overlap", "sigma", "sweep", "barrier", "rebasin", "alpha"])
def test_a_folder_that_is_a_file_is_refused_before_anything_is_looked_for(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    line = refused(command, "--stream", "nowhere", "--out", tmp_path / "file")
    assert line == f"error: expected --out as a folder, got {tmp_path / 'file'}, which is a file; choose another name"


def test_a_stream_is_analysed_with_the_experts_of_its_cache(stream: list[object], tmp_path: Path) -> None:
    vit = [*stream, "--set", "base.backbone=digits-vit", "--set", "base.kind=random"]
    said = lines("overlap", *vit, "--layers", "blocks.0")
    assert said[0].split() == ["mean", "SAR", "task-0", "task-1"]
    assert len(list((tmp_path / "cache" / "expert").glob("*.safetensors"))) == 2
    assert lines("overlap", *vit, "--layers", "blocks.0") == said
    assert lines("sigma", *vit, "--fold", "all", "--layers", "blocks.0")[2].startswith("backbone.blocks.0")
    assert len(list((tmp_path / "cache" / "expert").glob("*.safetensors"))) == 2


def test_a_sweep_marks_the_defaults_and_the_best(stream: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("sweep", *stream, "--step", "1", "--out", out)
    assert result.exit_code == 0, result.stderr
    said = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in said[2:8]] == ["base", "task-0", "task-1", "mean", "sum", "best"]
    assert said[5][1:3] == ["0.5", "0.5"]
    content = json.loads((out / "sweep.json").read_text())
    assert content["values"] == [0.0, 1.0, 2.0]
    assert content["eval_sets"] == ["task-0", "task-1"]
    best = max(sum(point) / 2 for row in content["accuracy"] for point in row)
    assert sum(content["points"]["best"]["accuracy"]) / 2 == pytest.approx(best)
    assert (out / "sweep.png").is_file()


def test_a_barrier_between_the_base_and_an_expert_is_on_its_own_task(stream: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = lines("barrier", *stream, "--experts", "base,task-1", "--points", "3", "--out", out)
    assert [line.split()[0] for line in said[2:5]] == ["0", "0.5", "1"]
    assert said[5].startswith("barrier: ")
    assert said[5].endswith(" on task-1")
    assert sorted(file.name for file in out.iterdir()) == ["barrier.json", "barrier.png"]


def test_wrong_input_to_a_stream_is_one_line(stream: list[object]) -> None:
    assert "expected the name of a stream, got 'tiy'" in refused("sweep", "--stream", "tiy", "--plugin", TOYS)
    assert "expected the name of an expert, got 'task-9'" in refused("sweep", *stream, "--experts", "task-0,task-9")
    assert "expected --experts as two of base, task-0, task-1, got 1: task-0" in refused(
        "barrier", *stream, "--experts", "task-0"
    )
    assert "expected every expert once, got 'base' 2 times" in refused("barrier", *stream, "--experts", "base,base")
    assert "expected the name of an eval set, got 'test'" in refused("barrier", *stream, "--eval", "test")
    assert "expected the name of a fold of tiny, got 'none'" in refused("sweep", *stream, "--fold", "none")
    assert "expected --step above 0, got 0" in refused("sweep", *stream, "--step", "0")
    assert "expected --points from 3 to 1001, got 2" in refused("barrier", *stream, "--points", "2")
    assert "expected --device as one of auto, cpu, cuda, got 'gpu'" in refused("barrier", "--stream", "tiny", "--device", "gpu")
    assert "expected matrices in the base, got no tensor with two dimensions" in refused("overlap", *stream)
    assert "expected an expert on 'task-0', got: " in refused("sweep", *stream, "--set", "recipe.lr=1e38")
    assert "expected an eval set with a task of base or task-1, got task-0" in refused(
        "barrier", *stream, "--experts", "base,task-1", "--eval", "task-0"
    )


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from shiftproof.benchmark.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "analyze", "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert all(command in done.stdout for command in ("overlap", "sigma", "sweep", "barrier"))
