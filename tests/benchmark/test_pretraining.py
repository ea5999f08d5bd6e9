"""Bases: Barlow Twins against its formula, views that keep colours, and weights from files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shiftproof.benchmark import ArrayData, BaseRecipe, RunContext
from shiftproof.benchmark.backbones import SmallConvNet
from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.errors import InputError, NotFiniteError
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.pretraining import barlow_twins, base_weights, random_light, random_view, redundancy_loss, supervised
from shiftproof.benchmark.recipes import Recipe
from shiftproof.benchmark.registry.lookup import Registry

CPU = torch.device("cpu")
RECIPE = BaseRecipe("digits-cnn", kind="barlow-twins", epochs=15, batch_size=32, dim=16)


def build() -> SmallConvNet:
    return SmallConvNet((3, 8, 8), (8, 8, 8))


@pytest.fixture
def inputs(registry: Registry) -> list[Tensor]:
    spec = registry.stream("tiny")
    return list(spec.build(replace(spec.config(), samples=96), None).unlabelled())


def weights(recipe: BaseRecipe, inputs: list[Tensor], folder: Path, make: Callable[[], nn.Module] = build) -> dict[str, Tensor]:
    return base_weights(recipe, make, inputs, Cache(folder), "identity", CPU)


def test_the_loss_is_the_formula_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 12, 5))
    correlation = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            x, y = a[:, i] - a[:, i].mean(), b[:, j] - b[:, j].mean()
            correlation[i, j] = (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    on = sum((1 - correlation[i, i]) ** 2 for i in range(5))
    off = sum(correlation[i, j] ** 2 for i in range(5) for j in range(5) if i != j)
    loss = redundancy_loss(torch.from_numpy(a), torch.from_numpy(b), 0.25)
    assert float(loss) == pytest.approx(on + 0.25 * off, rel=1e-4)


def test_the_loss_is_zero_for_equal_views_of_independent_dimensions_and_ignores_scale() -> None:
    a = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert float(redundancy_loss(a, 7 * a + 3, 1.0)) == pytest.approx(0, abs=1e-4)
    assert float(redundancy_loss(a, -a, 1.0)) == pytest.approx(8, abs=1e-3)  # both correlations are -1


def agreement(net: nn.Module, x: Tensor) -> float:
    """Mean correlation of features over two views."""
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        one, other = (net(random_view(x, generator)).numpy() for _ in range(2))
    varied = (one.std(0) > 0) & (other.std(0) > 0)
    pairs = zip(one.T[varied], other.T[varied], strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def test_two_views_agree_more_after_training_than_before(inputs: list[Tensor]) -> None:
    torch.manual_seed(0)
    net = build()
    x = torch.cat(inputs).float() / 255
    before = agreement(net, x)
    net.load_state_dict(barlow_twins(RECIPE, net, inputs, CPU))
    assert agreement(net, x) > before + 0.1


def test_views_of_one_colour_hold_this_colour_and_the_grey_of_the_hole_only() -> None:
    ink = torch.tensor([1.0, 0.25, 0.0]).view(1, 3, 1, 1)
    x = torch.rand(200, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * ink  # red of any brightness
    view = random_view(x, torch.Generator().manual_seed(1))
    hole = (view == 0.5).all(1)
    brightness = view[:, :1]
    torch.testing.assert_close(view.permute(1, 0, 2, 3)[:, ~hole], (brightness * ink).permute(1, 0, 2, 3)[:, ~hole])
    assert float(brightness.min()) >= 0
    assert float(brightness.max()) <= 1
    assert 0 < float(hole.float().mean()) <= 1 / 16


def test_views_differ_between_pictures_and_draws_and_repeat_with_the_generator() -> None:
    x = torch.rand(1, 3, 16, 16).expand(10, 3, 16, 16)
    generator = torch.Generator().manual_seed(1)
    one, other = random_view(x, generator), random_view(x, generator)
    assert len({tuple(picture.flatten().tolist()) for picture in (*one, *other)}) == 20
    assert torch.equal(one, random_view(x, torch.Generator().manual_seed(1)))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["random", "barlow-twins"])
def test_a_base_depends_on_its_recipe_alone_whatever_was_drawn_before(kind: str, inputs: list[Tensor], tmp_path: Path) -> None:
    recipe = replace(RECIPE, kind=kind, epochs=2)  # type: ignore[arg-type]
    first = weights(recipe, inputs, tmp_path / "a")
    torch.rand(5)
    before = torch.get_rng_state()
    assert equal(weights(recipe, inputs, tmp_path / "b"), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(weights(replace(recipe, seed=1), inputs, tmp_path / "c"), first)


class Dropping(SmallConvNet):
    def __init__(self) -> None:
        super().__init__((3, 8, 8), (8, 8, 8))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(super().forward(x))
        return dropped


def test_a_backbone_that_draws_while_it_is_trained_does_not_shift_the_generators_of_the_run(
    inputs: list[Tensor], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, epochs=1)
    bases, draws = [], []
    for folder, seed in (("a", 1), ("a", 1), ("b", 2)):  # made, read back, made under another seed of the run
        torch.manual_seed(seed)
        bases.append(weights(recipe, inputs, tmp_path / folder, Dropping))
        draws.append(torch.rand(2).tolist())
    assert equal(bases[0], bases[1])
    assert equal(bases[0], bases[2])
    assert draws[0] == draws[1] != draws[2]


def test_pre_training_is_done_once_for_all_who_share_a_cache(inputs: list[Tensor], tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for _ in range(3):
        base_weights(replace(RECIPE, epochs=1), build, inputs, cache, "identity", CPU)
    base_weights(replace(RECIPE, epochs=1), build, inputs, cache, "another", CPU)
    assert cache.made == {"base": 2}


def test_a_learning_rate_that_is_too_high_is_an_error_and_not_a_base(inputs: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"expected finite weights after pre-training, got NaN or infinity; lower base.lr"):
        weights(replace(RECIPE, lr=1e30), inputs, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_fewer_pictures_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    assert weights(replace(RECIPE, epochs=1, batch_size=256), [x], tmp_path).keys() == build().state_dict().keys()


def test_a_base_in_a_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    saved = build().state_dict()
    save_file(saved, path)
    assert equal(weights(BaseRecipe("digits-cnn", "file", file=str(path)), [], tmp_path), saved)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected a safetensors file at 'base.safetensors'"),
        (b"\x00" * 30, "expected a safetensors file at 'base.safetensors'"),
        ({"layers.0.weight": torch.zeros(1)}, "names or shapes that differ: layers.0.bias, layers.0.weight, layers.2.bias"),
        ({"extra": torch.zeros(1)}, "names or shapes that differ: extra"),
    ],
    ids=["missing", "damaged", "shape", "name"],
)
def test_a_file_that_is_not_this_backbones_is_one_line(
    tmp_path: Path, content: bytes | dict[str, Tensor] | None, said: str
) -> None:
    path = tmp_path / "base.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({**(build().state_dict() if "extra" in content else {}), **content}, path)
    with pytest.raises(InputError) as caught:
        weights(BaseRecipe("digits-cnn", "file", file=str(path)), [], tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


SUPERVISED = BaseRecipe("digits-cnn", kind="supervised", epochs=30, batch_size=32, lr=0.01)


@pytest.fixture
def stripes() -> ArrayData:
    """Stripes across or along under noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(128) % 2
    wave = (torch.arange(8) // 2 % 2).float()
    x = torch.where(y[:, None, None] == 1, wave, wave[:, None])[:, None].expand(-1, 3, -1, -1) * 150
    return ArrayData((x + torch.rand(128, 3, 8, 8, generator=generator) * 60).to(torch.uint8), y)


def test_a_supervised_base_answers_before_anything_was_learned(stripes: ArrayData, tmp_path: Path) -> None:
    made = base_weights(SUPERVISED, build, [], Cache(tmp_path), "identity", CPU, stripes)
    run = RunContext(0, Recipe(), lambda: (Model(build(), {0: 2, 1: 2}), made), "", Cache(tmp_path), tmp_path)
    net = run.new_model().eval()
    with torch.no_grad():
        assert (net(stripes.inputs(slice(None)), 0).argmax(1) == stripes.y).float().mean() > 0.95
    assert torch.equal(net.head(0).weight, made["heads.0.weight"])
    assert torch.equal(run.child("expert").new_model().head(1).weight, net.head(1).weight)


def test_a_supervised_base_repeats_itself_and_is_made_once(stripes: ArrayData, tmp_path: Path) -> None:
    short = replace(SUPERVISED, epochs=2)
    cache = Cache(tmp_path)
    first, again = (base_weights(short, build, [], cache, "identity", CPU, stripes) for _ in range(2))
    alone = base_weights(short, build, [], Cache(tmp_path / "other"), "identity", CPU, stripes)
    assert cache.made["base"] == 1
    assert first.keys() == again.keys() == alone.keys() == {*build().state_dict(), "heads.0.weight", "heads.0.bias"}
    assert all(torch.equal(first[name], other[name]) for name in first for other in (again, alone))


def test_a_supervised_base_without_labelled_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected labelled data for a supervised base, got a stream without"):
        base_weights(SUPERVISED, build, [], Cache(tmp_path), "identity", CPU)


def test_a_learning_rate_that_is_too_high_for_labels_is_an_error_as_well(stripes: ArrayData) -> None:
    with pytest.raises(NotFiniteError, match=r"lower base\.lr"):
        supervised(replace(SUPERVISED, lr=1e30, epochs=3), build(), stripes, CPU)


def test_light_changes_contrast_and_brightness_only_within_bounds() -> None:
    grey = torch.full((200, 3, 8, 8), 0.5)
    lit = random_light(grey, torch.Generator().manual_seed(0))
    assert bool((lit.flatten(1).std(1) < 1e-6).all())  # neither invents a pattern
    assert 0.3 <= float(lit.min()) < float(lit.max()) <= 0.7
    half = torch.zeros(200, 3, 8, 8)
    half[..., 4:] = 1
    lit = random_light(half, torch.Generator().manual_seed(0))
    assert bool((lit[..., -1] > lit[..., 0]).all())  # contrast is never inverted
    blurred = ((lit[:, 0, 0, 3] - lit[:, 0, 0, 0]).abs() > 1e-6).float().mean()
    assert 0.2 < float(blurred) < 0.5
