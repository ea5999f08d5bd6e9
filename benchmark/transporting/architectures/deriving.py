"""Which architecture a state dict belongs to, and its specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.models import Model
from shiftproof.benchmark.transporting.architectures import vision
from shiftproof.benchmark.transporting.drafting import FIXED, Draft
from shiftproof.benchmark.transporting.specification import PermutationSpec, Run, Shapes, specify


@dataclass(frozen=True)
class Family:
    """An architecture that is told by its names.

    Attributes:
        marks: Tensors that all of them have.
        draft: Adds its tensors; is given the number of attention heads, 0 where nobody said.
    """

    name: str
    marks: tuple[str, ...]
    draft: Callable[[Draft, int], None]


FAMILIES = (Family("a Vision Transformer of timm", ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"), vision.timm_vit),)


def derive(shapes: Shapes, heads: int = 0, prefix: str = "") -> PermutationSpec:
    """The specification of a state dict of a known architecture.

    Args:
        shapes: Of its tensors.
        heads: Attention heads; shapes do not tell them.
        prefix: What the names begin with.

    Raises:
        InputError: If no family is known by these names, tensors are left over, or the heads are not given or do not fit.
    """
    for family in FAMILIES:
        if all(prefix + mark in shapes for mark in family.marks):
            draft = Draft(shapes, prefix)
            family.draft(draft, heads)
            return draft.finish()
    known = ", ".join(family.name for family in FAMILIES)
    raise InputError(f"expected the tensors of {known}, got {', '.join(list(shapes)[:3])} and so on; give a specification")


def derive_model(model: nn.Module) -> PermutationSpec:
    """The specification of a module, whose number of heads is read off it.

    Raises:
        InputError: As `derive`.
    """
    if isinstance(model, Model):
        return _with_heads(model, derive_model(model.backbone))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return derive(shapes, heads_of(model))


def heads_of(model: nn.Module) -> int:
    """Attention heads of a module, 0 where it has none.

    Raises:
        InputError: If its layers have different numbers of them.
    """
    found = {
        count
        for module in model.modules()
        for name in ("num_heads", "num_attention_heads", "heads", "n_heads")
        if isinstance(count := getattr(module, name, None), int)
    }
    if len(found) > 1:
        raise InputError(f"expected one number of attention heads, got {sorted(found)}; give a specification")
    return next(iter(found), 0)


def _with_heads(model: Model, backbone: PermutationSpec) -> PermutationSpec:
    """A backbone and its linear heads, which read its features."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    axes = {f"backbone.{name}": each for name, each in backbone.axes.items()}
    for task in model.heads:
        repeat = model.width // backbone.sizes[backbone.output] if backbone.output else 1
        axes[f"heads.{task}.weight"] = ((), (Run(backbone.output, repeat),) if backbone.output else ())
        axes[f"heads.{task}.bias"] = ((),)
    return specify(axes, shapes, backbone.heads, backbone.chains, FIXED)
