"""Plans of suites, and what is run of them, how often."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shiftproof.benchmark import Stream
from shiftproof.benchmark.contracts import SuiteSpec
from shiftproof.benchmark.errors import InputError, OutputError
from shiftproof.benchmark.records import RecordStore, RunRecord, RunRequest
from shiftproof.benchmark.registry.lookup import Registry, load_registry
from shiftproof.benchmark.running import jobs
from shiftproof.benchmark.running.cells import build_stream
from shiftproof.benchmark.running.matrix import Outcome, Plan, RunOptions, Step, plan, run_plan, states

PlanOf = Callable[..., Plan]


@pytest.fixture
def carry_out(registry: Registry, tmp_path: Path) -> Callable[..., Outcome]:
    """Run a plan inline in the folder "out"."""

    def run(plan: Plan, steps: list[Step] | None = None, **options: Any) -> Outcome:
        files = tuple(map(str, registry.files))
        wanted = RunOptions(tmp_path / "out", "inline", entry_points=registry.only, files=files, **options)
        return run_plan(plan, registry, wanted, None if steps is None else steps.append)

    return run


CarryOut = Callable[..., Outcome]


def names(plan: Plan) -> list[tuple[str, str, int]]:
    return [(cell.request.label, cell.request.stream, cell.request.seed) for cell in plan.cells]


def test_a_plan_is_the_product_of_streams_strategies_folds_and_seeds(plan_of: PlanOf) -> None:
    plan = plan_of("toy,union@half", streams="tiny,tiny-last", seeds=(0, 3))
    assert names(plan) == [
        (strategy, stream, seed) for stream in ("tiny", "tiny-last") for strategy in ("toy", "union@half") for seed in (0, 3)
    ]
    assert {cell.request.fold for cell in plan.cells} == {"all"}
    assert len({cell.run_id for cell in plan.cells}) == 8


def test_what_cannot_be_combined_is_skipped_with_its_reason(plan_of: PlanOf) -> None:
    plan = plan_of("toy,grouped,missing", streams="tiny,tiny-plain")
    assert [(one.strategy, one.stream, one.reason) for one in plan.skipped] == [
        ("missing", "tiny", "needs shiftproof[clip]"),
        ("grouped", "tiny-plain", "needs group labels, the stream has none"),
        ("missing", "tiny-plain", "needs shiftproof[clip]"),
    ]
    assert names(plan) == [("toy", "tiny", 0), ("grouped", "tiny", 0), ("toy", "tiny-plain", 0)]


def test_two_plans_have_the_same_ids(plan_of: PlanOf) -> None:
    assert [cell.run_id for cell in plan_of("toy,er").cells] == [cell.run_id for cell in plan_of("toy,er").cells]


def test_overrides_reach_their_scope_and_no_other(plan_of: PlanOf) -> None:
    plan = plan_of("toy,union,union@half", "union@half.scale=0.25", "toy.scale=3", "momentum=0.5")
    assert [cell.config.scale for cell in plan.cells] == [3, 1, 0.25]
    assert {cell.stream.recipe.momentum for cell in plan.cells} == {0.5}


def test_later_overrides_win_over_those_of_the_suite(plan_of: PlanOf) -> None:
    plan = plan_of("toy", "recipe.epochs=3", overrides=("recipe.epochs=1", "recipe.lr=0.5"))
    assert (plan.cells[0].stream.recipe.epochs, plan.cells[0].stream.recipe.lr) == (3, 0.5)


@pytest.mark.parametrize(
    ("overrides", "suite", "custom"),
    [
        ((), {}, False),
        (("toy.scale=2",), {}, False),
        (("recipe.epochs=1",), {}, True),
        (("base.seed=1",), {}, True),
        (("stream.p_corr=0.75",), {}, True),
        (("recipe.epochs=2", "stream.p_corr=0.9"), {}, False),  # what it is anyway: the same run as without them
        ((), {"overrides": ("recipe.epochs=1",), "recipe": "short"}, False),  # ranked under the recipe's name
        ((), {"overrides": ("recipe.epochs=1",)}, True),
        (("recipe.lr=0.5",), {"overrides": ("recipe.epochs=1",), "recipe": "short"}, True),
        (("recipe.epochs=1",), {"overrides": ("recipe.epochs=1",), "recipe": "short"}, False),
    ],
)
def test_a_run_is_custom_where_stream_recipe_or_base_were_changed_by_hand(
    plan_of: PlanOf, overrides: tuple[str, ...], suite: dict[str, Any], custom: bool
) -> None:
    (cell,) = plan_of("toy", *overrides, **suite).cells
    assert cell.request.custom is custom
    assert cell.identity["recipe"]["name"] == suite.get("recipe", "tiny")


def test_a_run_with_the_standard_values_written_out_is_the_standard_run(plan_of: PlanOf) -> None:
    assert plan_of("toy", "recipe.epochs=2").cells[0].run_id == plan_of("toy").cells[0].run_id


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scale=2", "expected one owner of the knob 'scale', got 2: toy, union; write toy.scale=2 or union.scale=2"),
        ("toi.scale=2", "expected a scope before .scale=2, got 'toi'; did you mean 'toy'?"),
        ("toy.skale=2", "expected a knob of toy, got 'skale'; did you mean 'scale'?"),
        ("scale", "expected an override like SCOPE.KEY=VALUE, got 'scale'"),
    ],
)
def test_wrong_overrides_are_one_line(plan_of: PlanOf, override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_of("toy,union", override)
    assert said in str(caught.value)


def test_finished_cells_are_not_run_again(plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path) -> None:
    log = tmp_path / "log"
    plan = plan_of("counted", f"counted.file={log}", seeds=(0, 1))
    steps: list[Step] = []
    first, second = carry_out(plan, steps), carry_out(plan, steps)
    assert (first.finished, first.reused, second.finished, second.reused) == (2, 0, 0, 2)
    told = [(step.done, step.total, step.status) for step in steps]
    assert told == [(0, 2, ""), (1, 2, "finished"), (2, 2, "finished")]
    more = carry_out(plan_of("counted", f"counted.file={log}", seeds=(0, 1, 2)))
    assert (more.finished, more.reused) == (1, 2)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["0", "1", "2"]


def test_rerun_runs_finished_cells_again_with_the_same_results(plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path) -> None:
    plan = plan_of("counted", f"counted.file={tmp_path / 'log'}")
    store = RecordStore(tmp_path / "out")
    carry_out(plan)
    before = store.all()
    assert carry_out(plan, rerun=True).finished == 1
    assert (tmp_path / "log").read_text().count("\n") == 2
    assert [record.results_sha256 for record in store.all()] == [record.results_sha256 for record in before]


def test_two_labels_of_one_cell_are_run_once(plan_of: PlanOf, carry_out: CarryOut) -> None:
    outcome = carry_out(plan_of("union,union@half", "union.scale=0.5"))
    assert (outcome.finished, outcome.reused) == (1, 0)


def attempts(folder: Path) -> list[int]:
    return [record.attempts for record in RecordStore(folder).all()]


def test_a_failed_cell_is_tried_once_more_and_then_only_when_asked_for(
    plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path
) -> None:
    plan, seen = plan_of("crash"), []
    for options in ({}, {}, {}, {}, {"retry_failed": True}, {}, {"rerun": True}):
        outcome = carry_out(plan, **options)
        assert len(outcome.failed) == 1
        seen += attempts(tmp_path / "out")
    assert seen == [1, 2, 2, 2, 3, 3, 4]


def test_what_another_process_has_tried_since_the_plan_is_not_tried_again(
    plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("crash")
    carry_out(plan)
    read = RecordStore.read
    calls = iter((True, False, False, False, False))

    def stale(self: RecordStore, run_id: str) -> RunRecord | None:
        return None if next(calls) else read(self, run_id)  # the planner saw nothing yet

    monkeypatch.setattr(RecordStore, "read", stale)
    assert len(carry_out(plan).failed) == 1
    monkeypatch.undo()
    assert attempts(tmp_path / "out") == [1]


def test_a_failing_strategy_does_not_stop_the_suite(plan_of: PlanOf, carry_out: CarryOut) -> None:
    outcome = carry_out(plan_of("nan-loss,peeker,quitter,canceller,toy"))
    assert outcome.finished == 1
    assert [record.label for record in outcome.failed] == ["nan-loss", "peeker", "quitter", "canceller"]
    assert outcome.contract_violated
    assert not carry_out(plan_of("nan-loss")).contract_violated


def test_states_say_what_is_left_to_do(plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path) -> None:
    carry_out(plan_of("toy,crash"))
    assert states(plan_of("toy,crash,plain"), tmp_path / "out") == ["finished", "failed", "to run"]


def test_a_truncated_record_is_one_line_and_nothing_is_run(plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path) -> None:
    carry_out(plan_of("toy"))
    (path,) = (tmp_path / "out" / "records").glob("*.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match=f"{path.name}: expected a complete JSON file"):
        carry_out(plan_of("toy,plain"))
    assert len(list(path.parent.iterdir())) == 1


def test_no_jobs_is_wrong_input(plan_of: PlanOf, carry_out: CarryOut) -> None:
    with pytest.raises(InputError, match="expected 1 or more jobs, got 0"):
        carry_out(plan_of("toy"), jobs=0)


def test_an_output_folder_that_cannot_be_written_is_one_line(plan_of: PlanOf, carry_out: CarryOut, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match=r"expected to write .* into .*; choose another folder"):
        carry_out(plan_of("toy"))


def test_a_stream_is_built_once_for_all_cells_of_a_worker(
    plan_of: PlanOf, carry_out: CarryOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build(registry: Registry, request: RunRequest, root: str | None) -> Stream:
        built.append(request.stream)
        return build_stream(registry, request, root)

    monkeypatch.setattr("shiftproof.benchmark.running.jobs.build_stream", build)
    jobs._stream.cache_clear()
    outcome = carry_out(plan_of("plain,tensor-logs", streams="tiny,tiny-last", seeds=(0, 1)))
    assert outcome.finished == 8
    assert built == ["tiny", "tiny-last"]
    jobs._stream.cache_clear()


def test_a_plugin_that_breaks_or_goes_away_after_the_plan_is_one_line(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "going.py"
    file.write_text(registry.files[0].read_text())
    loaded = load_registry((), [file])
    planned = plan(loaded, SuiteSpec("s", "", ("tiny",), ("toy",), (0,)))
    options = RunOptions(tmp_path / "out", "inline", entry_points=(), files=(str(file),))
    file.write_text("import no_such_module\n")
    with pytest.raises(InputError, match=r"plugin 'going' .* cannot be used: ModuleNotFoundError") as caught:
        run_plan(planned, loaded, options)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as it comes back from a worker
    file.unlink()
    with pytest.raises(InputError, match="expected a Python file as plugin, got"):
        run_plan(planned, loaded, options)


def test_a_plugin_that_is_edited_after_the_plan_is_refused_and_run_anew_after_the_next(
    registry: Registry, tmp_path: Path
) -> None:
    source = registry.files[0].read_text()
    file = tmp_path / "edited.py"
    options = RunOptions(tmp_path / "out", "inline", entry_points=(), files=(str(file),))

    def planned() -> tuple[Plan, Registry]:
        loaded = load_registry((), [file])
        return plan(loaded, SuiteSpec("s", "", ("tiny",), ("toy",), (0,))), loaded

    file.write_text(source)
    old, loaded = planned()
    file.write_text(source.replace("return self.config.scale *", "return 3 * self.config.scale *"))
    with pytest.raises(InputError, match="a file changed while the suite was running: start it again"):
        run_plan(old, loaded, options)
    assert RecordStore(tmp_path / "out").all() == []
    new, loaded = planned()
    assert run_plan(new, loaded, options).finished == 1
    assert new.cells[0].run_id != old.cells[0].run_id
    (record,) = RecordStore(tmp_path / "out").all()
    file.write_text(source)
    again, loaded = planned()
    run_plan(again, loaded, options)
    other = RecordStore(tmp_path / "out").read(old.cells[0].run_id)
    assert other is not None
    assert other.logs[0]["loss"] != record.logs[0]["loss"]  # the old code ran, not what an earlier plan had loaded
