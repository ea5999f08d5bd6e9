"""One cell: what determines it, what goes wrong in it, and what its record says."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from shiftproof.benchmark.boards.verification import record_problems
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.contracts import MetricSpec, SuiteSpec
from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.records import RecordStore, RunRecord, RunRequest, sha256
from shiftproof.benchmark.registry.lookup import Observers, Registry, load_registry
from shiftproof.benchmark.running.matrix import Plan, plan
from shiftproof.benchmark.running.runner import CellRun, run_cell

Run = Callable[..., RunRecord]
PlanOf = Callable[..., Plan]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_record_is_sound_and_its_metrics_follow_from_its_counts(run: Run, registry: Registry, tmp_path: Path) -> None:
    record = run("toy", "toy.scale=0.5")
    assert record.status == "finished"
    assert record_problems(record, list(registry.metrics.values())) == []
    assert record.run_id == sha256(record.identity)
    assert record.identity["config"] == {"scale": 0.5, "file": ""}
    assert (record.cost["optimizer_steps"], record.cost["samples_seen"]) == (12, 192)
    assert record.cost["wall_seconds"] == pytest.approx(record.cost["train_seconds"] + record.cost["eval_seconds"], abs=0.002)
    assert record.plugin["distribution"] == "toys.py"
    assert [set(entry) for entry in record.logs] == [{"loss"}, {"loss"}]
    assert files_below(tmp_path / "out") == [f"records/{record.run_id}.json"]
    assert RecordStore(tmp_path / "out").read(record.run_id) == record


def test_a_failed_record_is_sound_too(run: Run, registry: Registry) -> None:
    record = run("crash")
    assert record_problems(record, list(registry.metrics.values())) == []
    assert (record.status, record.results, record.results_sha256, record.metrics) == ("failed", None, None, {})


def test_counts_are_those_of_the_model_that_was_trained(plan_of: PlanOf, registry: Registry, tmp_path: Path) -> None:
    (cell,) = plan_of("plain").cells
    attempt = CellRun(cell, registry, tmp_path, cache(tmp_path), "cpu", 30.0)
    strategy = cell.spec.build(cell.config, attempt.context)
    attempt.cell = replace(cell, spec=replace(cell.spec, build=lambda *_: strategy))
    results = attempt.results()
    net = strategy.model().eval()
    for column, eval_set in enumerate(cell.stream.folds[0].evals):
        task, data = eval_set.parts[0]
        guess = net(data.x.float() / 255, task).argmax(1).numpy()
        for group, (correct, total) in enumerate(results["counts"][-1][column]):
            member = eval_set.groups.numpy() == group
            assert correct / total == pytest.approx(accuracy_score(data.y.numpy()[member], guess[member]))


def cache(folder: Path) -> Any:
    from shiftproof.benchmark.cache import Cache

    return Cache(folder / "cache")


@pytest.mark.parametrize("strategies", ["toy", "er", "plain", "careless"])
def test_the_same_seed_gives_the_same_results_with_other_cells_in_between(run: Run, strategies: str) -> None:
    first = run(strategies)
    run("careless", seeds=(5,))
    run(strategies, seeds=(1,))
    torch.rand(3), np.random.rand(3)
    again = run(strategies)
    assert first.status == "finished"
    assert again.results == first.results
    assert again.logs == first.logs
    assert run(strategies, seeds=(1,)).logs != first.logs


def test_global_draws_are_those_of_seed_and_experience_whatever_was_drawn_before(run: Run) -> None:
    first = run("drawer").logs
    torch.rand(3), np.random.rand(3)
    assert run("drawer").logs == first
    assert len({value for entry in (*first, *run("drawer", seeds=(1,)).logs) for value in entry.values()}) == 8


IDENTITIES = {
    "seed": {"seeds": (1,)},
    "knob": {"arguments": ("toy.scale=2",)},
    "stream knob": {"arguments": ("stream.p_corr=0.75",)},
    "recipe": {"arguments": ("recipe.lr=0.1",)},
    "base": {"arguments": ("base.seed=1",)},
    "stream": {"streams": "tiny-last"},
}


@pytest.mark.parametrize("change", IDENTITIES.values(), ids=IDENTITIES)
def test_the_run_id_changes_with_all_that_determines_the_result(plan_of: PlanOf, change: dict[str, Any]) -> None:
    (before,) = plan_of("toy").cells
    (after,) = plan_of("toy", *change.pop("arguments", ()), **change).cells
    assert after.run_id != before.run_id
    assert plan_of("toy").cells[0].run_id == before.run_id


def test_the_run_id_changes_with_the_strategys_code_and_not_with_the_presets_name(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, by_hand = plan_of("union@half").cells[0], plan_of("union", "union.scale=0.5").cells[0]
    assert half.run_id == by_hand.run_id
    assert (half.request.label, by_hand.request.label) == ("union@half", "union")
    monkeypatch.setattr("shiftproof.benchmark.codehash.code_sha256", lambda *modules: "0" * 64)
    assert plan_of("union@half").cells[0].run_id != half.run_id


FAILURES = {
    "nan-loss": ("NotFiniteError", "expected a finite loss, got nan in epoch 0", "experience 'task-1'"),
    "nan-logs": ("NotFiniteError", "expected finite numbers from learn(), got norm = nan", "experience 'task-0'"),
    "nan-logits": ("NotFiniteError", "expected finite logits on eval set 'task-0', got NaN or infinity", "experience 'task-0'"),
    "no-logs": ("ContractError", "expected learn() to return numbers by name, got None", "experience 'task-0'"),
    "crash": ("FileNotFoundError", "[Errno 2] No such file or directory: 'weights.pt'", "experience 'task-0', toys.py:"),
    "quitter": ("SystemExit", "I quit", "experience 'task-0', toys.py:"),
    "canceller": ("CancelledError", "too late", "experience 'task-0', toys.py:"),
    "peeker": ("ContractError", "the strategy reads group labels without declaring it: set uses_group_labels=True", "toys.py:"),
    "scribbler": ("ContractError", "the strategy alters the training data in place", "experience 'task-0'"),
}


@pytest.mark.parametrize("strategy", FAILURES)
def test_a_failure_is_a_record_with_its_reason_and_place_in_one_line_without_paths(run: Run, strategy: str) -> None:
    kind, message, where = FAILURES[strategy]
    record = run(strategy)
    assert record.error is not None
    assert record.status == "failed"
    assert record.error["type"] == kind
    assert message in record.error["message"]
    assert where in record.error["where"]
    assert re.search(r", \w+\.py:\d+ in \w+$", record.error["where"])
    text = record.to_json()
    assert "somebody" not in text
    assert str(Path.cwd()) not in text
    assert not any("\n" in part for part in record.error.values())


@pytest.mark.parametrize("scribbler", ["scribbler", "late-scribbler"])
def test_data_that_a_strategy_scribbled_on_are_not_there_for_the_next_cell(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, scribbler: str
) -> None:
    from shiftproof.benchmark.running.matrix import RunOptions, run_plan

    alone = run_plan(plan_of("plain"), registry, RunOptions(tmp_path / "a", "inline", files=loose(registry)))
    plan = plan_of(f"{scribbler},plain")
    both = run_plan(plan, registry, RunOptions(tmp_path / "b", "inline", files=loose(registry)))
    assert (alone.finished, both.finished, len(both.failed)) == (1, 1, 1)
    after, before = (RecordStore(tmp_path / name).read(plan.cells[1].run_id) for name in "ba")
    assert after is not None
    assert before is not None
    assert after.results == before.results
    assert both.failed[0].error is not None
    assert "alters the training data in place" in both.failed[0].error["message"]


def test_a_base_is_learned_from_the_data_as_they_were_before_a_strategy_altered_them(
    plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    learned = ("base.kind=barlow-twins", "base.epochs=1", "base.batch_size=16")
    clean = run_cell(plan_of("plain", *learned).cells[0], registry, tmp_path / "a", Cache(tmp_path / "one"))
    (cell,) = plan_of("plain", *learned).cells

    def build(config: Any, context: Any) -> Any:
        cell.stream.folds[0].train[0].train.x.zero_()  # type: ignore[union-attr]  # a DataExperience
        return cell.spec.build(config, context)

    altering = replace(cell, spec=replace(cell.spec, build=build))
    altered = run_cell(altering, registry, tmp_path / "b", Cache(tmp_path / "other"))
    assert (clean.status, altered.status) == ("finished", "failed")
    assert altered.protocol["base_weights_sha256"] == clean.protocol["base_weights_sha256"]


def test_settings_of_the_process_that_a_strategy_leaves_altered_do_not_reach_the_next_cell(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    before = run("plain")

    def settings() -> list[object]:
        own = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_default_device(), torch.backends.mkldnn.enabled
        return [*own, np.geterr(), dict(os.environ), Path.cwd()]

    clean = settings()
    assert run("meddler").status == "finished"
    assert settings() == clean
    assert run("plain").results == before.results


def loose(registry: Registry) -> tuple[str, ...]:
    return tuple(map(str, registry.files))


def test_numbers_of_any_kind_are_written_as_plain_numbers(run: Run) -> None:
    record = run("tensor-logs")
    assert record.logs == [{"loss": 0.5, "norm": 2.0, "steps": 3.0}] * 2


def test_a_stream_whose_order_means_nothing_is_measured_once(run: Run) -> None:
    record = run("toy", streams="tiny-last")
    assert record.results is not None
    assert record.results["experiences"] == ["task-1"]
    assert np.array(record.results["counts"]).shape == (1, 2, 4, 2)
    assert len(record.logs) == 2
    assert record.metrics["forgetting"]["value"] is None


def test_joint_learns_once_and_is_measured_on_every_set(run: Run) -> None:
    record = run("union")
    assert record.results is not None
    assert record.results["experiences"] == ["joint"]
    assert np.array(record.results["counts"]).shape == (1, 2, 4, 2)
    assert record.cost["samples_seen"] == 192


def test_permuted_groups_change_nothing_for_who_does_not_declare_them(
    plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    def results(strategy: str, permute: bool) -> Any:
        (cell,) = plan_of(strategy).cells
        fold = cell.stream.folds[0]
        train = tuple(replace(one, groups=one.groups.flip(0)) for one in fold.train) if permute else fold.train  # type: ignore[union-attr, call-arg]
        stream = replace(cell.stream, folds=(replace(fold, train=train),))
        record = run_cell(replace(cell, stream=stream), registry, tmp_path / f"{strategy}{permute}")
        return record.results, record.logs

    assert results("toy", True) == results("toy", False)
    assert results("grouped", True) != results("grouped", False)


class Listener:
    """An observer that writes down what it hears, and tries to alter it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[Any] = []
        for name in ("run_started", "experience_learned", "run_finished"):
            monkeypatch.setattr(Observers, name, self.hear(name))

    def hear(self, name: str) -> Callable[..., None]:
        def tell(_: Observers, *facts: Any) -> None:
            self.heard.append((name, *[json.loads(json.dumps(fact, default=str)) for fact in facts[1:]]))
            if name == "experience_learned":
                facts[2]["loss"] = -1.0
                facts[3].clear()
            torch.rand(1)

        return tell


def test_observers_hear_of_every_experience_and_cannot_alter_the_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run("plain")
    listener = Listener(monkeypatch)
    record = run("plain")
    assert [entry[0] for entry in listener.heard] == ["run_started", *["experience_learned"] * 2, "run_finished"]
    assert record.results == undisturbed.results
    assert record.logs == undisturbed.logs
    assert record.results is not None
    assert [entry[3] for entry in listener.heard[1:3]] == record.results["counts"]


class Stop(BaseException):
    """Stands for SIGKILL."""


def interrupted(plan: Plan, registry: Registry, out: Path, after: int) -> CellRun:
    """An attempt that ends behind checkpoint number `after`, counted from 1."""
    attempt = CellRun(plan.cells[0], registry, out, cache(out), "cpu", 0.0)
    write, count = attempt.write_checkpoint, iter(range(1, after + 1))

    def write_and_stop(state: Any) -> None:
        write(state)
        if next(count) == after:
            raise Stop

    attempt.checkpointer.write = write_and_stop
    with pytest.raises(Stop):
        attempt.results()
    return attempt


@pytest.mark.parametrize("strategy", ["toy", "er", "der++", "grouped"])
@pytest.mark.parametrize("after", [1, 6, 7, 9])  # 6 steps and 1 tick of the runner an experience
def test_results_cost_and_logs_of_a_resumed_cell_equal_those_of_an_uninterrupted_one(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, strategy: str, after: int
) -> None:
    plan = plan_of(strategy)
    whole = run_cell(plan.cells[0], registry, tmp_path / "whole")
    before = interrupted(plan, registry, tmp_path / "cut", after)
    record = run_cell(plan.cells[0], registry, tmp_path / "cut")
    assert record.results == whole.results
    assert record.logs == whole.logs
    counted = ("optimizer_steps", "samples_seen", "experts_trained")
    assert [record.cost[name] for name in counted] == [whole.cost[name] for name in counted]
    assert record.provenance["resumed_from"] == [0 if after < 7 else 1]
    assert record.cost["wall_seconds"] >= before.progress.seconds
    assert files_below(tmp_path / "cut") == [f"records/{record.run_id}.json"]


def test_observers_of_a_resumed_cell_hear_of_what_was_learned_before(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(plan_of("toy"), registry, tmp_path, 8)
    listener = Listener(monkeypatch)
    record = run_cell(plan_of("toy").cells[0], registry, tmp_path)
    assert record.provenance["resumed_from"] == [1]
    assert record.results is not None
    assert [entry[1] for entry in listener.heard[1:3]] == ["task-0", "task-1"]
    assert [entry[3] for entry in listener.heard[1:3]] == record.results["counts"]


def test_a_checkpoint_can_be_passed_over(plan_of: PlanOf, registry: Registry, tmp_path: Path) -> None:
    plan = plan_of("toy")
    interrupted(plan, registry, tmp_path, 8)
    assert run_cell(plan.cells[0], registry, tmp_path, from_start=True).provenance["resumed_from"] == []


def test_a_checkpoint_that_cannot_be_read_starts_the_cell_again(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of("toy")
    whole = run_cell(plan.cells[0], registry, tmp_path / "whole")
    attempt = interrupted(plan, registry, tmp_path / "cut", 8)
    attempt.checkpoint.write_bytes(attempt.checkpoint.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        record = run_cell(plan.cells[0], registry, tmp_path / "cut")
    assert "cannot be read, the cell starts again" in caplog.text
    assert record.results == whole.results
    assert record.provenance["resumed_from"] == []


def test_a_full_disk_at_a_checkpoint_is_the_users_to_mend_and_not_the_strategys_fault(
    plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OutputError, match=r"expected to write .*\.pt into .*; free space or choose another folder"):
        run_cell(plan_of("toy").cells[0], registry, tmp_path, checkpoint_seconds=0)
    assert files_below(tmp_path) == ["checkpoints"]


def test_an_interrupt_from_the_keyboard_writes_no_record(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shiftproof.benchmark.running.runner.evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_cell(plan_of("toy").cells[0], registry, tmp_path)
    assert files_below(tmp_path) == []


def test_failed_attempts_are_counted_and_a_success_replaces_them(
    run: Run, plan_of: PlanOf, registry: Registry, tmp_path: Path
) -> None:
    assert [run("crash").attempts for _ in range(3)] == [1, 2, 3]
    (cell,) = plan_of("crash").cells
    mended = replace(cell, spec=replace(cell.spec, build=registry.strategies["toy"].build))
    record = run_cell(mended, registry, tmp_path / "out")
    assert (record.status, record.attempts) == ("finished", 4)


def test_the_time_for_the_base_which_all_cells_share_is_not_the_cells(
    plan_of: PlanOf, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(recipe: Any, build: Callable[[], torch.nn.Module], *_: Any) -> dict[str, torch.Tensor]:
        time.sleep(1.5)
        return build().state_dict()

    monkeypatch.setattr("shiftproof.benchmark.running.bases.base_weights", slow)
    before = time.monotonic()
    (cell,) = plan_of("tensor-logs").cells
    record = run_cell(cell, registry, tmp_path)
    assert record.cost["wall_seconds"] <= time.monotonic() - before - 1.5


def test_scratch_of_a_cell_is_gone_once_it_is_recorded(plan_of: PlanOf, registry: Registry, tmp_path: Path) -> None:
    (cell,) = plan_of("toy").cells
    scratch = tmp_path / "work" / cell.run_id
    scratch.mkdir(parents=True)
    (scratch / "part").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f".{cell.run_id}.pt.killed").write_text("x")
    record = run_cell(cell, registry, tmp_path)
    assert files_below(tmp_path) == [f"records/{record.run_id}.json"]


@pytest.mark.parametrize("value", [lambda scores: 1 / 0, lambda scores: float("inf"), lambda scores: "good", sys.exit])
def test_a_metric_that_fails_is_left_open_and_does_not_cost_the_run(
    run: Run, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    monkeypatch.setitem(registry.metrics, "odd", MetricSpec("odd", value, True, "an odd one"))
    record = run("toy")
    assert record.status == "finished"
    assert record.metrics["odd"]["value"] is None
    assert record.metrics["average"]["value"] is not None
    assert "metric odd failed" in caplog.text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("toy.scale=-1", "toy.scale: expected float >= 0, got '-1'"),
        ("stream.p_corr=2", "tiny.p_corr: expected float >= 0.5 <= 1, got '2'"),
        ("recipe.epochs=0", "recipe.epochs: expected int >= 1, got '0'"),
        ("recipe.epocs=1", "'epocs'; did you mean 'epochs'?"),
        ("base.backbone=digits-cn", "expected the name of a backbone, got 'digits-cn'; did you mean 'digits-cnn'?"),
        ("base.kind=file", "expected the base's weights in a safetensors file, got '', which is not there"),
    ],
)
def test_wrong_input_is_one_line_before_anything_runs(plan_of: PlanOf, override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of("toy", override)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_file_that_does_not_fit_is_wrong_input_and_not_a_failed_cell(plan_of: PlanOf, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"layers.0.weight": torch.zeros(2)}, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match="does not fit the backbone"):
        plan_of("toy", "base.kind=file", f"base.file={tmp_path / 'base.safetensors'}")


def test_requests_are_values() -> None:
    assert RunRequest("a", "b", 0) == RunRequest("a", "b", 0)
    assert len({RunRequest("a", "b", 0), RunRequest("a", "b", 0), RunRequest("a", "b", 1)}) == 2


def test_making_experts_is_no_part_of_a_cells_time(tmp_path: Path) -> None:
    registry = load_registry(("fine-tuning", "references"), [Path(__file__).parents[2] / "toys.py"])
    (cell,) = plan(registry, SuiteSpec("merging", "", ("tiny",), ("ensemble",), (0,))).cells
    before = time.monotonic()
    records = [run_cell(cell, registry, tmp_path / name, Cache(tmp_path / "cache")) for name in ("made", "cached")]
    elapsed = time.monotonic() - before
    assert [record.cost["experts_trained"] for record in records] == [2, 0]
    assert [record.cost["experts_reused"] for record in records] == [0, 2]
    assert all(0 <= record.cost["train_seconds"] < elapsed for record in records)
    assert records[0].results_sha256 == records[1].results_sha256
