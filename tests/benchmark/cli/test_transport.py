"""`shiftproof transport` from files to a file: what arrives, what is told, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shiftproof.benchmark.backbones import SmallViT
from shiftproof.benchmark.cli.main import app
from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.architectures import derive_model

SHAPE = (3, 8, 8)


def network(width: int = 16, depth: int = 2) -> SmallViT:
    return SmallViT(SHAPE, width=width, depth=depth, heads=4)


def drawn(seed: int, model: SmallViT | None = None) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    state = (model or network()).state_dict()
    return {name: 0.5 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def tuned(state: StateDict) -> StateDict:
    generator = torch.Generator().manual_seed(7)
    return {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in state.items()}


@torch.no_grad()
def features(state: StateDict) -> torch.Tensor:
    model = network()
    model.load_state_dict(state)
    found: torch.Tensor = model.eval()(torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1)))
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A base, its fine-tuning, and a new release that is the base in another order."""
    base = drawn(0)
    shared = derive_model(network()).shared()
    states = {"a": base, "ft": tuned(base), "b": shared.apply(base, shared.random(torch.Generator().manual_seed(3)))}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors", {"format": "pt", "who": name})
    return {name: tmp_path / f"{name}.safetensors" for name in states}


def call(files: dict[str, Path], *extra: str | Path, method: str = "transfusion") -> Any:
    given = ["--source-base", files["a"], "--source-tuned", files["ft"], "--target-base", files["b"]]
    out = [] if "--out" in extra else ["--out", files["a"].parent / "out.safetensors"]
    heads = [] if "--heads" in extra else ["--heads", "4"]
    return CliRunner().invoke(app, ["transport", method, *map(str, [*given, *out, *heads, *extra])])


def refused(files: dict[str, Path], *extra: str | Path, method: str = "transfusion") -> str:
    """The one line on standard error; nothing is written."""
    before = sorted(files["a"].parent.rglob("*"))
    result = call(files, *extra, method=method)
    assert result.exit_code == 2, result.output
    assert sorted(files["a"].parent.rglob("*")) == before
    (line,) = result.stderr.splitlines()
    assert "expected" in line
    return str(line)


@pytest.mark.parametrize("method", ["transfusion", "transfusion@shared", "transfusion@released", "git-rebasin", "ot"])
def test_a_renumbered_release_receives_the_whole_fine_tuning(files: dict[str, Path], method: str) -> None:
    result = call(files, method=method)
    assert result.exit_code == 0, result.output
    ours, theirs = features(load_file(files["a"].parent / "out.safetensors")), features(load_file(files["ft"]))
    # Features come in the order of the new release.
    assert torch.allclose(ours.sort(1).values, theirs.sort(1).values, atol=1e-4)


def test_tau_as_it_is_and_its_scale(files: dict[str, Path]) -> None:
    assert call(files, "--alpha", "0.5", method="vanilla").exit_code == 0
    a, ft, b, out = (load_file(files["a"].parent / f"{name}.safetensors") for name in ("a", "ft", "b", "out"))
    assert all(torch.allclose(out[name], b[name] + 0.5 * (ft[name] - a[name]), atol=1e-6) for name in b)


def test_the_output_says_how_it_was_made_and_keeps_the_targets_metadata(files: dict[str, Path]) -> None:
    result = call(files, "--alpha", "0.7")
    with safe_open(files["a"].parent / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    told = json.loads(metadata["shiftproof.transport"])
    assert metadata["who"] == "b"
    assert (told["method"], told["alpha"]) == ("transfusion", 0.7)
    assert {role: [item["name"] for item in items] for role, items in told["inputs"].items()} == {
        "source_base": ["a.safetensors"],
        "source_tuned": ["ft.safetensors"],
        "target_base": ["b.safetensors"],
    }
    assert str(files["a"].parent) not in metadata["shiftproof.transport"]
    for said in ("converged after", "similarity", "attention heads that move", "transported"):
        assert said in result.output


def test_an_alignment_that_was_saved_gives_the_same_output_and_serves_other_fine_tunings(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    assert call(files, "--save-alignment", folder / "al.safetensors").exit_code == 0
    first = load_file(folder / "out.safetensors")
    again = call(files, "--alignment", folder / "al.safetensors", "--force")
    assert again.exit_code == 0, again.output
    assert "aligned in" not in again.output
    assert all(tensor.equal(first[name]) for name, tensor in load_file(folder / "out.safetensors").items())
    save_file(tuned(tuned(drawn(0))), folder / "other.safetensors")
    other = {**files, "ft": folder / "other.safetensors"}
    assert call(other, "--alignment", folder / "al.safetensors", "--force").exit_code == 0


def test_an_alignment_of_other_checkpoints_or_of_another_method_is_refused(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    call(files, "--save-alignment", folder / "al.safetensors", "--dry-run")
    save_file(drawn(5), folder / "c.safetensors")
    swapped = {**files, "b": folder / "c.safetensors"}
    assert "made for this target base" in refused(swapped, "--alignment", folder / "al.safetensors")
    other = refused(files, "--alignment", folder / "al.safetensors", method="transfusion@shared")
    assert "by transfusion with residual=segments" in other
    assert "expected one of --alignment" in refused(files, "--alignment", "x", "--save-alignment", "y")


def test_a_new_head_comes_over_with_its_input_side_permuted(files: dict[str, Path]) -> None:
    folder, base = files["a"].parent, load_file(files["a"])
    head = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    save_file({**tuned(base), "head.weight": head, "head.bias": torch.zeros(3)}, files["ft"])
    result = call(files)
    assert result.exit_code == 0, result.output
    assert "carried over" in result.output
    out = load_file(folder / "out.safetensors")
    expected = features(tuned(base)) @ head.T
    body = {name: tensor for name, tensor in out.items() if not name.startswith("head.")}
    assert torch.allclose(features(body) @ out["head.weight"].T, expected, atol=1e-3)


def test_checkpoints_of_torch_are_read_too(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    for name in ("a", "ft", "b"):
        torch.save(load_file(files[name]), folder / f"{name}.pt")
    call(files)
    first = load_file(folder / "out.safetensors")
    other = {name: folder / f"{name}.pt" for name in files}
    assert call(other, "--force").exit_code == 0
    assert all(tensor.equal(first[name]) for name, tensor in load_file(folder / "out.safetensors").items())


def test_a_dry_run_tells_how_alike_the_releases_become_and_writes_nothing(files: dict[str, Path]) -> None:
    result = call(files, "--dry-run")
    assert result.exit_code == 0
    (row,) = [line.split() for line in result.stdout.splitlines() if line.startswith("all ")]
    assert float(row[3]) == pytest.approx(1.0, abs=1e-4)
    assert abs(float(row[2])) < 0.3
    assert not (files["a"].parent / "out.safetensors").exists()


def test_diagnostics_are_written_as_a_picture_and_as_numbers(files: dict[str, Path]) -> None:
    folder = files["a"].parent / "told"
    assert call(files, "--dry-run", "--diagnostics", folder).exit_code == 0
    told = json.loads((folder / "alignment.json").read_text())
    assert told["layers"][0]["layer"] == "all"
    assert {one["permutation"] for one in told["permutations"]} == set(derive_model(network()).sizes)
    assert (folder / "alignment.png").read_bytes().startswith(b"\x89PNG")


def test_a_specification_by_hand_serves_an_architecture_that_is_not_known(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    axes = {"in.weight": ["hidden", None], "in.bias": ["hidden"], "last.weight": [None, "hidden"]}
    (folder / "spec.json").write_text(json.dumps({"axes": axes}))
    generator = torch.Generator().manual_seed(0)
    base = {
        "in.weight": torch.randn(6, 4, generator=generator),
        "in.bias": torch.randn(6, generator=generator),
        "last.weight": torch.randn(3, 6, generator=generator),
    }
    order = torch.tensor([2, 0, 1, 5, 3, 4])
    target = {
        "in.weight": base["in.weight"][order],
        "in.bias": base["in.bias"][order],
        "last.weight": base["last.weight"][:, order],
    }
    states = {"a": base, "ft": {**base, "in.bias": base["in.bias"] + torch.arange(6.0)}, "b": target}
    for name, state in states.items():
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, files[name])
    assert "give a specification" in refused(files)
    assert call(files, "--specification", folder / "spec.json").exit_code == 0
    moved = load_file(folder / "out.safetensors")["in.bias"] - target["in.bias"]
    assert torch.allclose(moved, torch.arange(6.0)[order])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: {"b": drawn(1, network(width=32))}, "one architecture"),
        (lambda: {"b": drawn(1, network(depth=3))}, "one architecture"),
        (lambda: {"ft": drawn(1, network(width=32))}, "expected the architecture of"),
        (lambda: {"ft": drawn(1, network(depth=3))}, "expected the architecture of"),
        (lambda: {"ft": drawn(0)}, "expected a fine-tuned model"),
        (lambda: {"ft": {**tuned(drawn(0)), "norm.bias": torch.full((16,), torch.nan)}}, "NaN or infinity in 'norm.bias'"),
        (lambda: {"b": {**drawn(1), "norm.bias": torch.full((16,), torch.inf)}}, "NaN or infinity in 'norm.bias'"),
        (lambda: {"a": {**drawn(0), "odd": torch.ones(2)}, "b": {**drawn(1), "odd": torch.ones(2)}}, "every tensor of"),
        (lambda: {name: {**drawn(i), "odd": torch.ones(2)} for i, name in enumerate(("a", "ft", "b"))}, "to cover odd"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(files: dict[str, Path], change: Any, said: str) -> None:
    for name, state in change().items():
        save_file(state, files[name])
    assert said in refused(files)


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_weights_are_refused(files: dict[str, Path], zipped: bool) -> None:
    base = drawn(0)
    tied = {**base, "cls_token": base["norm.weight"].view(1, 1, -1)}
    torch.save(tied, files["a"].parent / "a.pt", _use_new_zipfile_serialization=zipped)
    said = refused({**files, "a": files["a"].parent / "a.pt"})
    assert "tied 'cls_token' and 'norm.weight'" in said


def test_transported_fine_tunings_merge_like_any_others(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    call(files)
    generator = torch.Generator().manual_seed(8)
    other = {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in drawn(0).items()}
    save_file(other, folder / "ft2.safetensors")
    assert call({**files, "ft": folder / "ft2.safetensors"}, "--out", folder / "out2.safetensors").exit_code == 0
    experts = [part for name in ("out", "out2") for part in ("--expert", str(folder / f"{name}.safetensors"))]
    merged = ["merge", "task-arithmetic", "--base", str(files["b"]), *experts, "--out", str(folder / "merged.safetensors")]
    assert CliRunner().invoke(app, merged).exit_code == 0
    whole = {name: t + (tuned(drawn(0))[name] - t) + (other[name] - t) for name, t in drawn(0).items()}
    ours, theirs = features(load_file(folder / "merged.safetensors")), features(whole)
    assert torch.allclose(ours.sort(1).values, theirs.sort(1).values, atol=1e-4)


def test_a_number_of_heads_that_is_missing_or_does_not_fit_is_refused(files: dict[str, Path]) -> None:
    for heads in ("0", "5", "-1"):
        assert "--heads" in refused(files, "--heads", heads)


def test_methods_that_do_not_transport_checkpoints_are_refused(files: dict[str, Path]) -> None:
    assert "which needs data" in refused(files, method="transfusion-few-shot")
    assert "does not" in refused(files, method="target-base")
    assert "does not" in refused(files, method="sgd")
    assert "did you mean" in refused(files, method="transfusio")
    assert "did you mean" in refused(files, "--set", "residul=shared")


def test_a_scale_that_leads_to_infinity_is_refused(files: dict[str, Path]) -> None:
    line = refused(files, "--alpha", "1e39", method="vanilla")
    assert "expected finite numbers for 'blocks.0." in line
    assert "got NaN or infinity with --alpha 1e+39; take a smaller --alpha" in line


def test_every_output_has_a_file_of_its_own(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    one = folder / "one.safetensors"
    for force in ((), ("--force",)):
        line = refused(files, "--out", one, "--save-alignment", one, *force)
        assert f"expected --out and --save-alignment apart, got {one} for both; rename one of them" in line
    assert "expected --out and --diagnostics apart" in refused(files, "--out", one, "--diagnostics", one)
    told = folder / "alignment.png"
    assert "--save-alignment and --diagnostics apart" in refused(files, "--save-alignment", told, "--diagnostics", folder)
    line = refused(files, "--save-alignment", files["ft"], "--force")
    assert "expected --save-alignment and --source-tuned apart" in line
    one.write_text("mine")
    assert "expected --out and --alignment apart" in refused(files, "--out", one, "--alignment", one, "--force")


def test_what_cannot_be_written_is_told_before_the_search(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    (folder / "file").write_text("mine")
    assert "expected --diagnostics as a folder, got" in refused(files, "--diagnostics", folder / "file")
    assert "expected --save-alignment as a file, got" in refused(files, "--save-alignment", folder, "--force")
    assert "make " in refused(files, "--save-alignment", folder / "none" / "al.safetensors")


def test_a_specification_of_brackets_within_brackets_is_one_line(files: dict[str, Path]) -> None:
    deep = files["a"].parent / "deep.json"
    deep.write_text("[" * 100_000)
    assert f"{deep}: expected " in refused(files, "--specification", deep)


def test_one_sweep_is_told_as_one(files: dict[str, Path]) -> None:
    assert "converged after 1 sweep, " in call({**files, "b": files["a"]}, "--dry-run").output


def test_outputs_that_exist_are_kept_unless_forced(files: dict[str, Path]) -> None:
    out = files["a"].parent / "out.safetensors"
    out.write_bytes(b"mine")
    assert "--force" in refused(files)
    assert out.read_bytes() == b"mine"
    assert "apart from the inputs" in refused(files, "--out", files["b"], "--force")
    (files["a"].parent / "al.safetensors").write_bytes(b"mine")
    out.unlink()
    assert "--force" in refused(files, "--save-alignment", files["a"].parent / "al.safetensors")


def test_a_process_that_is_killed_leaves_nothing(files: dict[str, Path]) -> None:
    folder = files["a"].parent
    before = sorted(folder.rglob("*"))
    options = {"--source-base": "a", "--source-tuned": "ft", "--target-base": "b"}
    given = [part for option, name in options.items() for part in (option, str(files[name]))]
    code = "from shiftproof.benchmark.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "transport",
        "transfusion",
        *given,
        "--heads",
        "4",
        "--out",
        str(folder / "out.safetensors"),
    ]
    for seconds in (1.5, 3.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        left = [path for path in sorted(folder.rglob("*")) if path not in before]
        assert left in ([], [folder / "out.safetensors"])  # the latter where it was done by then
        if left:
            load_file(left[0])
            left[0].unlink()
