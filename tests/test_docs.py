"""Every command in a README is run, as printed but for what would take minutes; every example is executed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shiftproof.benchmark.backbones import SmallViT

ROOT = Path(__file__).parents[1]
READMES = [ROOT / name for name in ("README.md", "plugins/README.md", "datasets/README.md", "leaderboards/README.md")]
SHIFTPROOF = str(Path(sys.executable).parent / "shiftproof")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(readme: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(readme.read_text(encoding="utf-8")) if found == language]


def commands() -> list[tuple[str, str]]:
    """(README, command) of every line of a block without a language that calls shiftproof, Python or make."""
    found = []
    for readme in READMES:
        for block in blocks(readme, ""):
            for line in block.splitlines():
                command = line.removeprefix(".venv/bin/")
                if command.startswith(("shiftproof ", "python -m shiftproof", "make ")):
                    found.append((str(readme.relative_to(ROOT)), command))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of somebody who follows the texts: an example file, finished runs, an installed package."""
    folder = tmp_path_factory.mktemp("reader")
    (example,) = (text for text in blocks(ROOT / "README.md", "python") if "SmoothConfig" in text)
    (folder / "my_method.py").write_text(example)
    shutil.copytree(ROOT / "leaderboards" / "runs" / "digits", folder / "runs" / "digits")
    shutil.copy(ROOT / "leaderboards" / "digits.json", folder / "board.json")
    for number, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(number)
        tensors = {"weight": torch.randn(16, 8, generator=generator), "bias": torch.randn(16, generator=generator)}
        save_file(tensors, folder / f"{name}.safetensors")
    for seed, name in enumerate(("old", "old-tuned", "new")):
        torch.manual_seed(seed)
        save_file(SmallViT((3, 8, 8), width=16, depth=1).state_dict(), folder / f"{name}.safetensors")
    return folder


def shell(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "COLUMNS": "200"}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def shortened(words: list[str]) -> list[str]:
    """Suites of many cells are planned, not run; other runs take one epoch, one seed and a base that needs no training."""
    short = ["--set", "recipe.epochs=1", "--set", "base.kind=random"]
    if words[1:3] == ["experts", "export"]:
        return [*words, *short]
    if (words[1] != "run" and words[1:3] != ["experts", "train"]) or "--dry-run" in words:
        return words
    if words[1] == "run" and "--stream" not in words:
        return [*words, "--dry-run"]
    return [*words, "--seeds", "0", *short]


def install_written_package(folder: Path) -> None:
    """What `new-strategy my-method` writes, installed beside the others without a network."""
    target = folder / "written"
    if (folder / "site").exists():
        return
    wrote = shell([SHIFTPROOF, "new-strategy", "my-method", "--into", str(target)], folder)
    assert wrote.returncode == 0, wrote.stderr
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", "site"]
    done = shell([sys.executable, *install, str(target / "shiftproof-my-method")], folder)
    assert done.returncode == 0, done.stderr


@contextmanager
def saved_alignment(words: list[str], folder: Path) -> Iterator[None]:
    """The alignment that a command takes, where the one before it in the text has been run by another process."""
    file = folder / words[words.index("--alignment") + 1] if "--alignment" in words else None
    if file is None or file.exists():
        yield
        return
    options = ("--source-base", "--source-tuned", "--target-base", "--heads")
    given = [part for option in options for part in (option, words[words.index(option) + 1])]
    command = [SHIFTPROOF, *words[1:3], *given, "--dry-run", "--out", "none.safetensors", "--save-alignment", str(file)]
    done = shell(command, folder)
    assert done.returncode == 0, done.stderr
    yield
    file.unlink()


def make_experts(words: list[str], folder: Path) -> None:
    """What the commands before this one have made: experts in the cache, and for most a folder with them."""
    starts = ("shiftproof experts train", "shiftproof experts export")
    (train, export) = (shlex.split(command) for _, command in commands() if command.startswith(starts))
    out = export[export.index("--out") + 1]
    shutil.rmtree(folder / out, ignore_errors=True)
    for earlier in [train] if words[1:3] == export[1:3] else [train, export]:
        done = shell([SHIFTPROOF, *shortened(earlier)[1:]], folder)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("readme", "command"), commands())
def test_a_command_in_a_readme_does_what_it_should(readme: str, command: str, place: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[-1] == "my-method" and words[1] != "new-strategy":
        install_written_package(place)
    if words[1:3] == ["experts", "export"] or any(Path(word).parts[:1] == ("experts",) for word in words[2:]):
        make_experts(words, place)
    if words[0] == "make":
        done = shell(["make", "--dry-run", "--directory", str(ROOT), *words[1:]], place)
    elif words[0] == "python":
        done = shell([sys.executable, *words[1:], *([str(place)] if "frozen.make" in command else [])], place)
    else:
        with saved_alignment(words, place):
            done = shell([SHIFTPROOF, *shortened(words)[1:]], place)
    assert done.returncode == 0, f"{readme}: {command}\n{done.stdout}\n{done.stderr}"


def test_the_merge_that_a_readme_prints_merges_checkpoints(place: Path) -> None:
    (example,) = (text for text in blocks(ROOT / "plugins" / "README.md", "python") if "MedianConfig" in text)
    (place / "median.py").write_text(example)
    files = "--base base.safetensors --expert a.safetensors --expert b.safetensors --out median.safetensors"
    done = shell([SHIFTPROOF, "merge", "median", "--plugin", "median.py", *files.split()], place)
    assert done.returncode == 0, done.stderr
    base, *experts = (load_file(place / f"{name}.safetensors")["weight"] for name in ("base", "a", "b"))
    lower = torch.minimum(experts[0] - base, experts[1] - base)  # torch's median of two is the lower one
    torch.testing.assert_close(load_file(place / "median.safetensors")["weight"], base + lower)


def test_the_transport_that_a_readme_prints_transports_checkpoints(place: Path) -> None:
    (example,) = (text for text in blocks(ROOT / "plugins" / "README.md", "python") if "ByNorm" in text)
    (place / "by_norm.py").write_text(example)
    files = "--source-base old.safetensors --source-tuned old-tuned.safetensors --target-base new.safetensors"
    command = [SHIFTPROOF, "transport", "by-norm", "--plugin", "by_norm.py", *files.split(), "--heads", "4"]
    done = shell([*command, "--out", "by-norm.safetensors"], place)
    assert done.returncode == 0, done.stderr
    old, tuned, new, out = (
        load_file(place / f"{name}.safetensors")["blocks.0.mlp.fc1.bias"] for name in ("old", "old-tuned", "new", "by-norm")
    )
    norms = [load_file(place / f"{name}.safetensors")["blocks.0.mlp.fc1.weight"].norm(dim=1) for name in ("old", "new")]
    by_rank = [torch.argsort(one) for one in norms]
    torch.testing.assert_close((out - new)[by_rank[1]], (tuned - old)[by_rank[0]])


def test_the_strategy_of_avalanche_that_a_readme_prints_runs(place: Path) -> None:
    (example,) = (text for text in blocks(ROOT / "plugins" / "README.md", "python") if "SynapticConfig" in text)
    (place / "synaptic.py").write_text(example)
    words = ["run", "--stream", "split-digits", "--strategy", "synaptic", "--plugin", "synaptic.py", "--out", "runs/synaptic"]
    done = shell([SHIFTPROOF, *shortened([SHIFTPROOF, *words])[1:]], place)
    assert done.returncode == 0, done.stderr


def test_what_a_readme_prints_trains_in_avalanches_loop(place: Path) -> None:
    (example,) = (text for text in blocks(ROOT / "plugins" / "README.md", "python") if "to_avalanche" in text)
    said = "\nprint(results['Top1_Acc_Stream/eval_phase/test_stream/Task000'], len(replay.storage_policy.buffer))"
    done = shell([sys.executable, "-W", "ignore", "-c", example + said], place)
    assert done.returncode == 0, done.stderr
    accuracy, stored = map(float, done.stdout.splitlines()[-1].split())
    assert accuracy > 0.2  # chance is 0.1, and 0.2 is what the last of five tasks alone would give
    assert 0 < stored <= 200


def test_the_specification_that_a_readme_prints_is_one(tmp_path: Path) -> None:
    from shiftproof.benchmark.transporting.notation import read_specification

    (example,) = blocks(ROOT / "plugins" / "README.md", "json")
    (tmp_path / "spec.json").write_text(example)
    shapes = {
        "embed.weight": (8, 3),
        "attn.in_proj_weight": (24, 8),
        "attn.in_proj_bias": (24,),
        "attn.out_proj.weight": (8, 8),
        "fc1.weight": (16, 8),
        "fc2.weight": (8, 16),
        "head.weight": (5, 8),
    }
    found = read_specification(tmp_path / "spec.json", shapes)
    assert found.sizes == {"stream": 8, "attn": 8, "middle": 8, "hidden": 16, "last": 8}
    assert found.heads == {"attn": 4}


def test_both_readmes_print_the_same_example() -> None:
    (root,) = (text for text in blocks(ROOT / "README.md", "python") if "SmoothConfig" in text)
    assert root in blocks(ROOT / "plugins" / "README.md", "python")


def test_the_readme_names_every_strategy_of_the_suites() -> None:
    from shiftproof.datasets.suites import DIGITS, MERGES, REFERENCES, TRANSPORTS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [name.partition("@")[0] for name in (*DIGITS, *MERGES, *REFERENCES, *TRANSPORTS)]
    assert [name for name in names if f"`{name}`" not in text] == []
