"""Bases: the weights that every strategy of a stream starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from shiftproof.benchmark.cache import Cache
from shiftproof.benchmark.context import derive_seed
from shiftproof.benchmark.errors import InputError, NotFiniteError
from shiftproof.benchmark.experiences import ArrayData, StateDict, as_float
from shiftproof.benchmark.models import HEADS, Model
from shiftproof.benchmark.recipes import BaseRecipe
from shiftproof.benchmark.records import PROTOCOL_VERSION

BASE = "base"  # kind of bases and releases in the cache
EMBEDDING_NORM = 2.0  # of a class embedding; features leave the backbone's last normalization with a norm near sqrt(D)


def base_weights(
    recipe: BaseRecipe,
    build: Callable[[], nn.Module],
    inputs: Sequence[Tensor],
    cache: Cache,
    sha256: str,
    device: torch.device,
    labelled: ArrayData | None = None,
) -> StateDict:
    """The backbone's state dict as the recipe makes it; a supervised base brings the head of task 0 as "heads.0.*".

    Args:
        build: Makes the backbone, drawing its weights from torch's global generator.
        inputs: The stream's training inputs, (N, C, H, W) each; only self-supervised bases look at them.
        sha256: Identity of the base, the key in the cache.
        labelled: What a supervised base learns from, and nothing else of the stream does.

    Raises:
        InputError: If a file is missing or does not fit the backbone, or a supervised base has nothing to learn from.
    """
    if recipe.kind == "file":
        return read_base(Path(recipe.file), build())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "base"))
        backbone = build()
    if recipe.kind == "random":
        return backbone.state_dict()

    def make() -> StateDict:
        # A backbone with dropout draws from the global generators.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(recipe.seed, recipe.kind))
            if recipe.kind == "barlow-twins":
                return barlow_twins(recipe, backbone, inputs, device)
            if labelled is None:
                raise InputError(
                    "base: expected labelled data for a supervised base, got a stream without; choose another kind"
                )
            return supervised(recipe, backbone, labelled, device)

    return cache.tensors(BASE, base_key(sha256, device), make)


def base_key(sha256: str, device: torch.device) -> dict[str, Any]:
    """What determines a base that is learned: its key in the cache.

    Args:
        sha256: Identity of the base.
    """
    return {"sha256": sha256, "device": device.type, "torch": torch.__version__, "protocol": PROTOCOL_VERSION}


def barlow_twins(recipe: BaseRecipe, backbone: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> StateDict:
    """Pre-train without labels: two views of an image agree, the dimensions of their projections do not.

    Zbontar et al., ICML 2021, arXiv:2103.03230; thesis section 4.2. The views move, scale, rotate and cut out; none alters
    colour, so that what a bias may live in stays in the features.

    Raises:
        NotFiniteError: If the weights end up NaN or infinite, which a lower learning rate cures.
    """
    x = torch.cat(list(inputs))
    width = backbone.features
    assert isinstance(width, int)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "projector"))
        projector = nn.Sequential(
            nn.Linear(width, recipe.dim, bias=False), nn.BatchNorm1d(recipe.dim), nn.ReLU(), nn.Linear(recipe.dim, recipe.dim)
        )
    net = nn.Sequential(backbone, projector).to(device).train()

    def loss(index: Tensor, generator: torch.Generator) -> Tensor:
        batch = as_float(x[index])
        views = [net(random_view(batch, generator).to(device)) for _ in range(2)]
        return redundancy_loss(views[0], views[1], recipe.redundancy)

    _descend(recipe, "barlow-twins", net, len(x), loss)
    return _finite(backbone.cpu().state_dict(), recipe)


def supervised(recipe: BaseRecipe, backbone: nn.Module, data: ArrayData, device: torch.device) -> StateDict:
    """Pre-train with labels on views that move, scale, rotate, cut out, blur and change contrast and brightness.

    Against class embeddings the head is `class_embeddings` and is not trained.

    Returns:
        The backbone's state dict, and the head's as "heads.0.weight" and "heads.0.bias".

    Raises:
        NotFiniteError: If the weights end up NaN or infinite, which a lower learning rate cures.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "head"))
        model = Model(backbone, {0: int(data.y.max()) + 1})
    if recipe.kind == "class-embeddings":
        head = model.head(0).requires_grad_(False)
        head.weight.copy_(class_embeddings(*head.weight.shape))
        head.bias.zero_()
    model.to(device).train()

    def loss(index: Tensor, generator: torch.Generator) -> Tensor:
        x = random_light(random_view(data.inputs(index), generator), generator)
        return F.cross_entropy(model(x.to(device), 0), data.y[index].to(device))

    _descend(recipe, "supervised", model, len(data), loss)
    model.cpu()
    heads = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(HEADS)}
    return _finite({**backbone.state_dict(), **heads}, recipe)


def class_embeddings(classes: int, width: int) -> Tensor:
    """(C, D) float32, orthogonal rows of norm `EMBEDDING_NORM`: the same for every base, whatever its seed and data.

    Raises:
        InputError: If there are more classes than dimensions.
    """
    if classes > width:
        raise InputError(f"base: expected at most {width} classes for features of that width, got {classes}")
    generator = torch.Generator().manual_seed(derive_seed(0, "class-embeddings"))
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    # The signs that QR leaves open differ between libraries.
    embeddings: Tensor = EMBEDDING_NORM * (q * r.diagonal().sign()).T[:classes]
    return embeddings.float()


def _descend(
    recipe: BaseRecipe, purpose: str, net: nn.Module, samples: int, loss: Callable[[Tensor, torch.Generator], Tensor]
) -> None:
    """Adam with half a cosine on whole batches; `loss` is handed the (B,) samples of a batch and the epoch's generator."""
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    batches = samples // recipe.batch_size or 1
    for epoch in range(recipe.epochs):
        generator = torch.Generator().manual_seed(derive_seed(recipe.seed, purpose, epoch))
        order = torch.randperm(samples, generator=generator)
        for step in range(batches):
            progress = (epoch * batches + step) / (recipe.epochs * batches)
            optimizer.param_groups[0]["lr"] = recipe.lr * (1 + math.cos(math.pi * progress)) / 2
            value = loss(order[step * recipe.batch_size : (step + 1) * recipe.batch_size], generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()


def random_light(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast (by 0.5 to 1.5) and brightness (by up to 0.2) of each of (B, C, H, W) images; a third of them is blurred."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(x), 1, 1, 1, generator=generator) * (high - low) + low

    lit = (x - 0.5) * uniform(0.5, 1.5) + 0.5 + uniform(-0.2, 0.2)
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 3, 3)
    blurred = F.conv2d(F.pad(lit, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
    return torch.where(uniform(0, 1) < 1 / 3, blurred, lit).clamp(0, 1)


def _finite(weights: StateDict, recipe: BaseRecipe) -> StateDict:
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise NotFiniteError(f"expected finite weights after pre-training, got NaN or infinity; lower base.lr, now {recipe.lr}")
    return weights


def redundancy_loss(a: Tensor, b: Tensor, redundancy: float) -> Tensor:
    """Sum over the cross-correlation matrix of (1 - diagonal)^2 plus `redundancy` times off-diagonal^2 (eq. 1).

    Args:
        a: (B, D) float32, projections of one view.
        b: (B, D) float32, of the other.
    """
    normalized = [(view - view.mean(0)) / (view.std(0, correction=0) + 1e-5) for view in (a, b)]
    correlation = normalized[0].T @ normalized[1] / len(a)  # (D, D)
    diagonal = correlation.diagonal()
    on = (1 - diagonal).square().sum()
    off = correlation.square().sum() - diagonal.square().sum()
    return on + redundancy * off


def random_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random affine view with a square cut out, drawn for each of (B, C, H, W) images; colours stay."""
    count, _, height, width = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.3, 0.3), uniform(0.85, 1.2)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    matrix = torch.stack(
        [torch.stack([cos, -sin, uniform(-0.2, 0.2)], 1), torch.stack([sin, cos, uniform(-0.2, 0.2)], 1)], 1
    )  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    view = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    rows, columns = torch.arange(height), torch.arange(width)
    top, left = uniform(0, height), uniform(0, width)
    side = 0.25 * height
    hole = ((rows >= top[:, None]) & (rows < top[:, None] + side))[:, :, None] & (
        (columns >= left[:, None]) & (columns < left[:, None] + side)
    )[:, None, :]
    return view.masked_fill(hole[:, None], 0.5)


def read_base(path: Path, backbone: nn.Module) -> StateDict:
    """The weights in a safetensors file, if their names and shapes are the backbone's.

    Raises:
        InputError: If the file cannot be read or does not fit.
    """
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"base: expected a safetensors file at {path.name!r}, got {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise InputError(f"base: {path.name!r} does not fit the backbone; names or shapes that differ: {', '.join(odd[:3])}")
    return weights
