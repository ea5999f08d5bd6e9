"""`shiftproof experts` on planted streams. Oracle: what runs of merges find in the cache, and what they measure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shiftproof.benchmark.cache import CONTENT
from shiftproof.benchmark.cli.main import app
from shiftproof.benchmark.evaluation import evaluate
from shiftproof.benchmark.experiences import state_sha256
from shiftproof.benchmark.experts.making import request_for
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.records import RecordStore
from shiftproof.benchmark.registry.catalogue import read_catalogue
from shiftproof.benchmark.registry.lookup import load_registry
from shiftproof.benchmark.running.cells import build_stream

TOYS = Path(__file__).parents[2] / "toys.py"
KNOBS = ("recipe.epochs=1", "stream.samples=24", "base.kind=barlow-twins", "base.epochs=1", "base.batch_size=16")
SET = [part for knob in KNOBS for part in ("--set", knob)]

# Streams beside the toys: domains held out in turn, unions of tasks, releases, and folds with other data under one name.
ODD = """
from dataclasses import dataclass, replace
from shiftproof.benchmark import BaseRecipe, DataExperience, StreamSpec, hookimpl, leave_one_domain_out
from shiftproof.benchmark.conformance import planted_stream

@dataclass(frozen=True)
class Nothing:
    knob: int = 0  # unused

def plain():
    stream = planted_stream()
    (fold,) = stream.folds
    return replace(stream, recipe=replace(stream.recipe, epochs=1)), fold, [one.without_groups() for one in fold.train]

def domains(config, root):
    stream, fold, parts = plain()
    three = [replace(one, index=i, name=name, task=0) for i, (name, one) in enumerate(zip("pqr", [*parts, parts[0]]))]
    evals = [replace(fold.evals[0], name=one.name) for one in three]
    return replace(stream, name="domains", folds=leave_one_domain_out(three, evals), heads={0: 2}, evaluate="last")

def union(config, root):
    stream, fold, _ = plain()
    return replace(stream, name="union", folds=(replace(fold, train=(fold.joint(),)),))

def splits(config, root):
    stream, fold, (first, second) = plain()
    other = replace(fold, name="again", train=(replace(second, name=first.name),))
    return replace(stream, name="splits", folds=(replace(fold, train=(first, second)), other))

def heads(config, root):
    stream, fold, (first, second) = plain()
    return replace(stream, name="heads", folds=(replace(fold, train=(replace(first, name="heads"), second)),))

def releases(config, root):
    stream, fold, parts = plain()
    folds = tuple(replace(fold, name=one.name, train=(replace(one, index=0),)) for one in parts)
    base = BaseRecipe("digits-cnn", "supervised", epochs=1, batch_size=16)
    heads = {0: 2, 5: 2, 6: 2}
    moved = tuple(replace(f, train=(replace(f.train[0], task=5 + i),), evals=(replace(f.evals[i], parts=((5 + i, d),)),))
                  for i, f in enumerate(folds) for d in [f.evals[i].parts[0][1]])
    data = {"base_data": parts[0].train, "release_data": parts[1].train}
    return replace(stream, name="releases", folds=moved, heads=heads, base=base, release=replace(base, seed=1), **data)

@hookimpl
def shiftproof_streams():
    builds = {"domains": domains, "union": union, "splits": splits, "named-heads": heads, "releases": releases}
    return [StreamSpec(name, build, Nothing, "digits", "planted", "generated", "MIT") for name, build in builds.items()]
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds nothing but the catalogue of the plugins."""
    folder = tmp_path_factory.mktemp("warm") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIFTPROOF_CACHE", str(folder))
        patch.setenv("SHIFTPROOF_PLUGINS", PLUGINS)
        read_catalogue()
    return folder


@pytest.fixture(autouse=True)
def cache(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no more plugins than it takes."""
    monkeypatch.setenv("SHIFTPROOF_PLUGINS", PLUGINS)
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(warm, tmp_path / "cache"))


@pytest.fixture
def other(warm: Path, tmp_path: Path) -> Path:
    """The cache of another machine."""
    return Path(shutil.copytree(warm, tmp_path / "other"))


@pytest.fixture
def odd(tmp_path: Path) -> list[object]:
    file = tmp_path / "odd.py"
    file.write_text(ODD)
    return ["--plugin", file, "--device", "cpu"]


PLUGINS = "fine-tuning,merging,digits"
TINY: Sequence[object] = ("tiny", "--plugin", TOYS, "--device", "cpu", *SET)


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line on standard error of a call that ends with 2 and prints nothing else."""
    result = call("experts", *arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return str(line)


def rows(*arguments: object) -> list[list[str]]:
    """The table of a call, without its header."""
    result = call("experts", *arguments)
    assert result.exit_code == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()[2:-1]]


def entries(cache: Path, kind: str = "expert") -> set[str]:
    return {file.name for file in (cache / kind).glob("*.safetensors")}


def ran(out: Path, *options: object, stream: str = "tiny", strategy: str = "weight-average") -> Any:
    """The one record of a run of a merge in this process."""
    given = ["--stream", stream, "--strategy", strategy, "--executor", "inline", "--device", "cpu", "--out", out, "--quiet"]
    done = call("run", *given, *options)
    assert done.exit_code == 0, done.output
    (record,) = RecordStore(out).all()
    return record


def test_training_makes_the_base_and_each_expert_once_and_a_run_of_a_merge_then_trains_nothing(
    cache: Path, tmp_path: Path
) -> None:
    assert rows("train", *TINY, "--seeds", "0,1") == [
        ["all", "base", "trained"],
        *([str(seed), f"task-{task}", "trained"] for seed in (0, 1) for task in (0, 1)),
    ]
    before = entries(cache)
    assert (len(before), len(entries(cache, "base"))) == (4, 1)
    assert {row[-1] for row in rows("train", *TINY, "--seeds", "0,1")} == {"found"}
    record = ran(tmp_path / "out", "--plugin", TOYS, *SET, "--seeds", "1")
    assert (record.cost["experts_trained"], record.cost["experts_reused"]) == (0, 2)
    assert (entries(cache), len(entries(cache, "base"))) == (before, 1)


def test_a_run_makes_what_training_then_finds(cache: Path, tmp_path: Path) -> None:
    ran(tmp_path / "out", "--plugin", TOYS, *SET, "--seeds", "0")
    assert [row[-1] for row in rows("train", *TINY, "--seeds", "0,1")] == ["found"] * 3 + ["trained"] * 2


def test_a_dry_run_says_what_is_missing_and_makes_nothing(cache: Path) -> None:
    assert {row[-1] for row in rows("train", *TINY, "--dry-run")} == {"missing"}
    assert entries(cache) == entries(cache, "base") == set()
    call("experts", "train", *TINY, "--seeds", "1")
    result = call("experts", "train", *TINY, "--seeds", "1,2", "--dry-run")
    assert result.stdout.splitlines()[-1] == "2 missing, 3 found"  # the base is one of them
    assert len(entries(cache)) == 2


def test_domains_that_are_held_out_in_turn_have_one_expert_each(odd: list[object], cache: Path) -> None:
    assert rows("train", "domains", *odd, "--seeds", "0") == [["0", name, "trained"] for name in "pqr"]
    assert len(entries(cache)) == 3


def test_folds_with_other_data_under_one_name_have_experts_of_their_own(odd: list[object], tmp_path: Path) -> None:
    names = [row[1] for row in rows("train", "splits", *odd, "--seeds", "0")]
    assert names == ["all/stripes", "again/stripes", "blocks"]
    out = ["--out", tmp_path / "out"]
    assert "expected --fold, since 'stripes' is not the same data in all folds" in refused("export", "splits", *odd, *out)
    assert call("experts", "export", "splits", *odd, *out, "--fold", "all").exit_code == 0
    assert sorted(load_file(tmp_path / "out" / "heads.safetensors")) == [
        f"heads.{task}.{part}" for task in (0, 1) for part in ("bias", "weight")
    ]


def test_the_list_says_of_each_expert_in_the_cache_what_it_is(cache: Path, odd: list[object]) -> None:
    assert "no such experts in the cache" in call("experts", "list").stdout
    call("experts", "train", *TINY, "--seeds", "0,1")
    call("experts", "train", "domains", *odd, "--seeds", "3")
    found = json.loads(call("experts", "list", "--json").stdout)
    assert [(one["stream"], one["seed"], one["experience"]) for one in found] == [
        *(("domains", 3, name) for name in "pqr"),
        *(("tiny", seed, f"task-{task}") for seed in (0, 1) for task in (0, 1)),
    ]
    assert {f"{one['cache_key']}.safetensors" for one in found} == entries(cache)
    assert sum(one["size"] for one in found) == sum(file.stat().st_size for file in cache.glob("expert/*.safetensors"))
    assert found[-1]["set"] == list(KNOBS[1:2] + KNOBS[:1] + KNOBS[2:])
    assert found[-1]["key"]["recipe"]["epochs"] == 1
    (first, *_) = rows("list", "tiny")
    assert (first[:3], first[-1]) == (["tiny", "0", "task-0"], found[3]["cache_key"][:12])
    assert {row[0] for row in rows("list", "tiny")} == {"tiny"}


def test_the_list_counts_what_does_not_say_what_it_is_and_passes_over_what_is_damaged(cache: Path) -> None:
    call("experts", "train", *TINY, "--seeds", "0")
    first, second = sorted(cache.glob("expert/*.safetensors"))
    weights = load_file(first)
    save_file(weights, first, {CONTENT: state_sha256(weights)})
    second.write_bytes(second.read_bytes()[:-5])
    result = call("experts", "list")
    assert (result.exit_code, "no such experts" in result.stdout) == (0, True)
    assert result.stderr.splitlines() == ["1 more were made by another version and do not say what they are"]
    assert [row[-1] for row in rows("train", *TINY, "--seeds", "0")].count("found") == 2  # the base, and one that says nothing


def exported(out: Path) -> list[Path]:
    assert call("experts", "train", *TINY, "--seeds", "0").exit_code == 0
    result = call("experts", "export", *TINY, "--out", out)
    assert result.exit_code == 0, result.stderr
    return [Path(line.removeprefix("wrote: ")) for line in result.stdout.splitlines()]


def test_exported_files_merge_to_the_model_that_a_run_of_the_merge_measures(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    files = exported(out)
    assert [file.name for file in files] == [f"{name}.safetensors" for name in ("base", "task-0", "task-1", "heads")]
    assert sorted(files) == sorted(out.iterdir())
    experts = [part for file in files[1:3] for part in ("--expert", file)]
    merged = call("merge", "weight-average", "--base", files[0], *experts, "--out", out / "merged.safetensors")
    assert merged.exit_code == 0, merged.stderr
    registry = load_registry(("fine-tuning",), [TOYS])
    stream = build_stream(registry, request_for(registry, "tiny", 0, "", KNOBS))
    model = Model(registry.backbone(stream.base.backbone).build(stream.input_shape), stream.heads)
    model.load_state_dict({**load_file(out / "merged.safetensors"), **load_file(out / "heads.safetensors")})
    counts = [[list(pair) for pair in one.groups] for one in evaluate(model, stream.folds[0].evals, torch.device("cpu"))]
    record = ran(tmp_path / "runs", "--plugin", TOYS, *SET, "--seeds", "0")
    assert record.results["counts"][-1] == counts


def test_every_file_says_what_it_is(tmp_path: Path) -> None:
    files = exported(tmp_path / "out")
    told = {}
    for file in files:
        with safe_open(file, "numpy") as opened:
            told[file.stem] = json.loads(opened.metadata()["shiftproof.export"])
    assert {(one["stream"], one["version"], one["seed"]) for one in told.values()} == {("tiny", "1", 0)}
    assert [one["part"] for one in told.values()] == ["base", "expert", "expert", "heads"]
    assert told["base"]["files"] == {f"{n}.safetensors": told[n]["weights_sha256"] for n in ("task-0", "task-1", "heads")}
    expert = told["task-1"]
    assert (expert["experience"], expert["key"]["seed"], expert["key"]["recipe"]["epochs"]) == ("task-1", 0, 1)
    assert {len(expert["key"]["data"]), len(expert["weights_sha256"]), len(expert["cache_key"])} == {64}
    assert str(tmp_path) not in json.dumps(told)


def test_what_was_exported_is_found_by_a_run_on_another_machine(
    cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "out")
    here = entries(cache) | entries(cache, "base")
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(other))
    taken = ["import", tmp_path / "out", "--plugin", TOYS]
    assert rows(*taken) == [["base", "imported"], ["task-0", "imported"], ["task-1", "imported"]]
    assert entries(other) | entries(other, "base") == here
    assert not (other / "import").exists()
    for name in entries(cache):
        theirs, ours = (load_file(folder / "expert" / name) for folder in (cache, other))
        assert theirs.keys() == ours.keys()
        assert all(bool((theirs[key] == ours[key]).all()) for key in theirs)
    assert {row[-1] for row in rows(*taken)} == {"found"}
    assert [row[2] for row in rows("list")] == ["task-0", "task-1"]
    record = ran(tmp_path / "runs", "--plugin", TOYS, *SET, "--seeds", "0")
    assert (record.cost["experts_trained"], record.cost["experts_reused"]) == (0, 2)
    assert len(entries(other, "base")) == 1


def test_one_shared_head_lies_in_the_files_that_merge(
    odd: list[object], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("experts", "train", "domains", *odd, "--seeds", "0")
    assert call("experts", "export", "domains", *odd, "--out", tmp_path / "out").exit_code == 0
    assert {file.stem for file in (tmp_path / "out").iterdir()} == {"base", "p", "q", "r"}
    assert "heads.0.weight" in load_file(tmp_path / "out" / "q.safetensors")
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(other))
    assert rows("import", tmp_path / "out", *odd[:2]) == [[name, "imported"] for name in "pqr"]


def test_a_stream_of_releases_is_exported_for_transport_and_imported(
    odd: list[object], cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = [["all", "base", "trained"], ["all", "release", "trained"]]
    assert rows("train", "releases", *odd, "--seeds", "0")[:2] == trained
    out = tmp_path / "out"
    result = call("experts", "export", "releases", *odd, "--out", out)
    assert result.exit_code == 0, result.stderr
    heads = {file.stem: {name for name in load_file(file) if name.startswith("heads")} for file in out.iterdir()}
    both = {"heads.0.weight", "heads.0.bias"}
    assert heads["base"] == heads["release"] == both
    assert heads["blocks"] == both | {"heads.6.weight", "heads.6.bias"}
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(other))
    assert {row[-1] for row in rows("import", out, *odd[:2])} == {"imported"}
    assert (entries(other), entries(other, "base")) == (entries(cache), entries(cache, "base"))
    assert {row[-1] for row in rows("train", "releases", *odd, "--seeds", "0", "--dry-run")} == {"found"}


def test_a_base_out_of_a_file_is_named_again_where_the_experts_are_imported(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "learned")
    base = load_file(tmp_path / "learned" / "base.safetensors")
    file = tmp_path / "somewhere" / "base.safetensors"
    file.parent.mkdir()
    save_file({name.removeprefix("backbone."): tensor for name, tensor in base.items()}, file)
    tiny = ["tiny", "--plugin", TOYS, "--device", "cpu", "--set", "base.kind=file", "--set"]
    assert "got 'nowhere', which is not there; name it with --set base.file=PATH" in refused(
        "train", *tiny, "base.file=nowhere"
    )
    assert [row[1] for row in rows("train", *tiny, f"base.file={file}", "--seeds", "0")] == ["task-0", "task-1"]
    assert call("experts", "export", *tiny, f"base.file={file}", "--out", tmp_path / "out").exit_code == 0
    assert not any(b"somewhere" in one.read_bytes() for one in (tmp_path / "out").iterdir())
    monkeypatch.setenv("SHIFTPROOF_CACHE", str(other))
    taken = ["import", tmp_path / "out", "--plugin", TOYS]
    assert "got 'base.safetensors', which is not there" in refused(*taken)
    another = file.with_name("another.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, another)
    line = refused(*taken, "--set", f"base.file={another}")
    assert "base.safetensors: expected the model that tiny starts from here, got others: backbone." in line
    assert rows(*taken, "--set", f"base.file={file}") == [["task-0", "imported"], ["task-1", "imported"]]


def test_what_the_cache_does_not_have_is_not_exported_and_not_trained(cache: Path, tmp_path: Path) -> None:
    line = refused("export", *TINY, "--out", tmp_path / "out", "--seed", "4")
    assert "expected the experts of tiny with seed 4 in the cache, got none of task-0, task-1; `" in line
    assert "`shiftproof experts train tiny --seeds 4 --set stream.samples=24 --set recipe.epochs=1" in line
    assert (entries(cache), (tmp_path / "out").exists()) == (set(), False)
    call("experts", "train", *TINY, "--seeds", "4")
    next(cache.glob("expert/*.safetensors")).unlink()
    assert "got none of task-" in refused("export", *TINY, "--out", tmp_path / "out", "--seed", "4")


def test_an_export_replaces_an_earlier_one_if_told_and_leaves_everything_else(odd: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported(out)
    (out / "mine.safetensors").write_text("mine")
    assert "which exists; give --force to replace an export in it" in refused("export", *TINY, "--out", out)
    call("experts", "train", "domains", *odd, "--seeds", "0")
    assert call("experts", "export", "domains", *odd, "--out", out, "--force").exit_code == 0
    assert {file.stem for file in out.iterdir()} == {"base", "p", "q", "r", "mine"}
    assert (out / "mine.safetensors").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "odd.py", "out"}


def test_force_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "models"
    exported(tmp_path / "first")
    out.mkdir()
    assert call("experts", "export", *TINY, "--out", out, "--force").exit_code == 0
    shutil.rmtree(out)
    out.mkdir()
    save_file({"w": torch.ones(2)}, out / "base.safetensors")
    before = (out / "base.safetensors").read_bytes()
    line = refused("export", *TINY, "--out", out, "--force")
    assert f"expected a new folder or an earlier export for --out, got {out}, which is none" in line
    assert [(file.name, file.read_bytes()) for file in out.iterdir()] == [("base.safetensors", before)]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    exported(tmp_path / "out")
    (tmp_path / "file").write_text("in the way")
    assert "expected --out as a folder, got" in refused("export", *TINY, "--out", tmp_path / "file")
    line = refused("export", *TINY, "--out", tmp_path / "file" / "out")
    assert "expected to write out into" in line
    assert "free space or choose another folder" in line


def test_wrong_input_is_one_line(odd: list[object], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    for command in (["train", "tiyn"], ["export", "tiyn", *out]):
        assert "expected the name of a stream, got 'tiyn'; did you mean 'tiny'" in refused(*command, "--plugin", TOYS)
    call("experts", "train", *TINY, "--seeds", "0")
    assert "got 'tiyn'; did you mean 'tiny'" in refused("list", "tiyn")
    assert "expected --seeds as integers of 0 or more, got '0,x'" in refused("train", *TINY, "--seeds", "0,x")
    assert "expected --seed of 0 or more, got -1" in refused("export", *TINY, *out, "--seed", "-1")
    assert "expected the name of a fold of tiny, got 'none'" in refused("export", *TINY, *out, "--fold", "none")
    assert "expected --device as one of auto, cpu, cuda, got 'gpu'" in refused("train", "tiny", "--device", "gpu")
    assert "expected a scope before .gamma=1, got 'toy'" in refused("train", *TINY, "--set", "toy.gamma=1")
    assert "expected an expert on 'task-0', got: " in refused("train", *TINY, "--set", "recipe.lr=1e38")
    for command in (["train", "union", *odd], ["export", "union", *odd, *out]):
        line = refused(*command)
        assert "expected a stream with data of each task or domain" in line
        assert "got union, which yields JointExperience" in line
    call("experts", "train", "named-heads", *odd, "--seeds", "0")
    line = refused("export", "named-heads", *odd, *out)
    assert "expected experiences whose names can be those of files, got 'heads' of heads" in line
    assert "expected a folder that `shiftproof experts export` wrote, got" in refused("import", tmp_path / "nowhere")
    assert "expected base.safetensors in" in refused("import", tmp_path)


KILLED = """
import os, signal, sys
from shiftproof.benchmark.cli.main import main
from shiftproof.benchmark.experts import exporting

write, written = exporting.write_part, []

def write_and_die(path, facts, tensors):
    if written:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, facts, tensors)
    written.append(path)

exporting.write_part = write_and_die
main()
"""


def test_an_export_that_is_killed_leaves_no_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    exported(tmp_path / "other")
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, "experts", "export", *map(str, TINY), "--out", str(out)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.*"))) == 1
    exported(out)
    assert list(tmp_path.glob(".out.*")) == []
    assert len(list(out.iterdir())) == 4


def test_help_and_list_import_no_torch() -> None:
    code = (
        "import sys; from shiftproof.benchmark.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as exit: print(exit.code, file=sys.stderr)\n"
        "print(sorted({'torch', 'matplotlib', 'scipy'} & set(sys.modules)), file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["list"], ["list", "b-digits"]):
        command = [sys.executable, "-c", code, "experts", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == "0\n[]\n"
    assert all(command in call("experts", "--help").stdout for command in ("list", "train", "export", "import"))
