"""A backbone with a head for each task."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shiftproof.benchmark import Model
from shiftproof.benchmark.backbones import ResNet18, SmallConvNet, shiftproof_backbones


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(SmallConvNet((3, 8, 8), (4, 4, 4)), {7: 2, 2: 5, 4: 2})


def batch(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    return x, torch.tensor([7, 2, 4])[torch.randint(0, 3, (count,), generator=generator)]


def test_a_mixed_batch_answers_as_its_samples_do_one_by_one(model: Model) -> None:
    x, task = batch()
    mixed = model(x, task)
    for i, one in enumerate(task.tolist()):
        alone = model(x[i : i + 1], one)[0]
        torch.testing.assert_close(mixed[i, : len(alone)], alone)
        assert mixed[i].argmax() == alone.argmax()


def test_missing_classes_of_a_narrower_head_are_finite_and_have_no_probability(model: Model) -> None:
    x, task = batch()
    mixed = model(x, task)
    narrow = mixed[task != 2]
    assert mixed.shape == (12, 5)
    assert bool(mixed.isfinite().all())
    assert torch.equal(narrow.softmax(1)[:, 2:], torch.zeros(len(narrow), 3))


def test_a_batch_of_one_task_equals_the_call_with_its_id_bit_for_bit(model: Model) -> None:
    x, _ = batch()
    assert torch.equal(model(x, torch.full((12,), 4)), model(x, 4))
    assert model(x, 4).shape == (12, 2)


def test_heads_of_absent_tasks_get_no_gradient_and_present_ones_that_of_their_own_samples(model: Model) -> None:
    x, _ = batch(4)
    task, y = torch.tensor([7, 4, 7, 7]), torch.tensor([0, 1, 1, 0])
    nn.functional.cross_entropy(model(x, task), y, reduction="sum").backward()
    mixed = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert mixed["heads.2.weight"] is None
    assert mixed["heads.2.bias"] is None
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(x[task == 7], 7), y[task == 7], reduction="sum").backward()
    torch.testing.assert_close(mixed["heads.7.weight"], model.head(7).weight.grad)


def test_head_keys_are_the_tensors_that_two_models_with_other_heads_differ_in(model: Model) -> None:
    other = Model(model.backbone, {2: 5, 4: 2})
    assert model.head_keys(7) == set(model.state_dict()) - set(other.state_dict()) == {"heads.7.weight", "heads.7.bias"}


def test_features_are_what_heads_classify(model: Model) -> None:
    x, task = batch()
    assert torch.equal(model.classify(model.features(x), task), model(x, task))


@pytest.mark.parametrize("spec", shiftproof_backbones(), ids=lambda spec: spec.name)
def test_backbones_give_as_many_features_as_they_say(spec: object) -> None:
    build = spec.build  # type: ignore[attr-defined]  # a BackboneSpec; the parametrization hides it
    backbone = build((3, 32, 32)).eval()
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, backbone.features)


def test_resnet18_normalizes_like_torchvision() -> None:
    from torchvision.models import ResNet18_Weights

    transform = ResNet18_Weights.IMAGENET1K_V1.transforms()
    net = ResNet18((3, 32, 32))
    assert net.mean.flatten().tolist() == pytest.approx(transform.mean)
    assert net.std.flatten().tolist() == pytest.approx(transform.std)
    assert not {"mean", "std"} & set(net.state_dict())
