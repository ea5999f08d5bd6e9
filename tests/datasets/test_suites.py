"""What the standard suites promise to hold."""

from shiftproof.benchmark import DataExperience, ExpertExperience, GroupedExperience, JointExperience
from shiftproof.benchmark.registry.lookup import load_registry

REGISTRY = load_registry()


def consuming(*kinds: type) -> set[str]:
    """Names of the strategies that ship here and consume experiences of these kinds."""
    return {name for name, spec in REGISTRY.strategies.items() if spec.consumes in kinds}


def named(suite: str) -> set[str]:
    """Names of the strategies of a suite, whatever their presets."""
    return {label.partition("@")[0] for label in REGISTRY.suites[suite].strategies}


def test_digits_all_has_every_strategy_that_trains_with_every_preset() -> None:
    names = consuming(DataExperience, GroupedExperience, JointExperience)
    presets = {f"{name}@{preset}" for name in names for preset in REGISTRY.strategies[name].presets}
    assert set(REGISTRY.suites["digits-all"].strategies) == names | presets


def test_digits_has_every_strategy_of_ours_that_trains() -> None:
    ours = {name for name in named("digits-all") if not name.startswith("avalanche-")}
    assert set(REGISTRY.suites["digits"].strategies) == ours


def test_domains_has_every_merge_and_every_strategy_that_trains_without_groups() -> None:
    assert named("domains") == consuming(ExpertExperience, DataExperience, JointExperience)
