"""Fisher-weighted averaging and regression mean, against closed forms."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark import ArrayData, DataExperience, ExpertExperience, InputError, Model, Recipe, RunContext
from shiftproof.benchmark.cache import Cache
from shiftproof.strategies.baselines.data_merging import (
    FisherConfig,
    FisherMerge,
    RegressionMean,
    RegressionMeanConfig,
    fisher_diagonal,
    gram_matrices,
)


class Flat(nn.Module):
    """The input itself, so that the head is all there is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    return RunContext(0, Recipe(), lambda: (model(0), {}), "", Cache(tmp_path / "cache"), tmp_path)


def model(seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(Flat(5), {0: 3})


def experience(seed: int, x: Tensor, base: Model) -> ExpertExperience:
    data = DataExperience(seed, f"expert-{seed}", 0, ArrayData(x, torch.zeros(len(x), dtype=torch.int64)))
    return ExpertExperience(seed, data.name, 0, base, model(seed), frozenset(base.state_dict()), data)


def inputs(seed: int, count: int = 200) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_the_fisher_information_of_a_linear_classifier_is_its_closed_form() -> None:
    net, x = model(1), inputs(2, 4000)
    found = fisher_diagonal(net, 0, x, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = net(x, 0).softmax(1)
    exact = torch.einsum("nc,nd->cd", p * (1 - p), x.square()) / len(x)  # E_y (1[y=c] - p_c)^2 = p_c (1 - p_c)
    torch.testing.assert_close(found["heads.0.weight"], exact, rtol=0.15, atol=0)
    torch.testing.assert_close(found["heads.0.bias"], (p * (1 - p)).mean(0), rtol=0.15, atol=0)


def test_frozen_parameters_have_information_and_stay_frozen() -> None:
    net = model(1).requires_grad_(False)
    found = fisher_diagonal(net, 0, inputs(0, 10), torch.Generator().manual_seed(0))
    assert bool((found["heads.0.weight"] > 0).any())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_whoever_has_all_the_information_decides(context: RunContext) -> None:
    base = model(0)
    blind, seeing = experience(1, torch.zeros(50, 5), base), experience(2, 100 * inputs(3), base)
    strategy = FisherMerge(FisherConfig(), context)
    for one in (blind, seeing):
        strategy.learn(one)
    merged = strategy.model().state_dict()["heads.0.weight"]
    torch.testing.assert_close(merged, seeing.expert.state_dict()["heads.0.weight"], rtol=1e-3, atol=1e-3)


def test_equal_information_gives_the_mean(context: RunContext) -> None:
    strategy = FisherMerge(FisherConfig(), context)
    one, other = (experience(seed, inputs(7), model(0)) for seed in (1, 2))
    for expert in (one, other):
        strategy.learn(expert)
    strategy.information[1] = strategy.information[0]
    states = [expert.expert.state_dict() for expert in (one, other)]
    for name, tensor in strategy.model().state_dict().items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)


def test_gram_matrices_are_those_of_what_linear_maps_are_given() -> None:
    x = inputs(4, 300)
    torch.testing.assert_close(gram_matrices(model(1), 0, x)["heads.0.weight"], x.double().T @ x.double() / len(x))


def test_regression_mean_is_the_least_squares_fit_to_every_experts_outputs(context: RunContext) -> None:
    strategy = RegressionMean(RegressionMeanConfig(keep=1.0), context)
    x = [inputs(1), 3 * inputs(2) + 1]
    learned = [experience(seed, data, model(0)) for seed, data in zip((1, 2), x, strict=True)]
    for one in learned:
        strategy.learn(one)
    weights = [one.expert.state_dict()["heads.0.weight"].double() for one in learned]
    rows = torch.cat([data.double() for data in x])
    outputs = torch.cat([data.double() @ weight.T for data, weight in zip(x, weights, strict=True)])
    fitted = torch.linalg.lstsq(rows, outputs).solution.T
    torch.testing.assert_close(strategy.model().state_dict()["heads.0.weight"].double(), fitted, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_never_active_leave_the_mean(context: RunContext) -> None:
    strategy = RegressionMean(RegressionMeanConfig(), context)
    x = inputs(1)
    x[:, 2] = 0
    learned = [experience(seed, x, model(0)) for seed in (1, 2)]
    for one in learned:
        strategy.learn(one)
    weights = torch.stack([one.expert.state_dict()["heads.0.weight"] for one in learned])
    torch.testing.assert_close(strategy.model().state_dict()["heads.0.weight"][:, 2], weights.mean(0)[:, 2])


def test_without_data_they_say_what_they_need(context: RunContext) -> None:
    one = deepcopy(experience(1, inputs(1), model(0)))
    with pytest.raises(InputError, match="this method needs data: run it on a stream"):
        FisherMerge(FisherConfig()).learn(one)
