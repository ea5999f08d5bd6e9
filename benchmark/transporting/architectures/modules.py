"""What a module tells about itself beyond the names and shapes of its tensors."""

from __future__ import annotations

from torch import nn

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.specification import Shapes

# Layers whose weights lie otherwise than those of others of their name, or that do not treat their units alike.
ODD = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.LocalResponseNorm, nn.ChannelShuffle)
HEAD_COUNTS = ("num_heads", "num_attention_heads", "heads", "n_heads")  # what attention modules call it


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def heads_of(model: nn.Module) -> int:
    """Attention heads of a module, 0 where it has none.

    Raises:
        InputError: If its layers have different numbers of them.
    """
    found = {
        count for module in model.modules() for name in HEAD_COUNTS if isinstance(count := getattr(module, name, None), int)
    }
    if len(found) > 1:
        raise InputError(f"expected one number of attention heads, got {sorted(found)}; give a specification")
    return next(iter(found), 0)


def check_module(model: nn.Module) -> None:
    """Refuse what names and shapes do not tell.

    Raises:
        InputError: If a weight has two names, or a layer does not treat its units alike.
    """
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = parameter.data_ptr() or -id(parameter)  # tensors without storage have no address
        if key in seen:
            raise InputError(
                f"expected no tied weights, got one tensor as {seen[key]} and {name}; give each its own, or a specification"
            )
        seen[key] = name
    for name, module in model.named_modules():
        if isinstance(module, ODD) or (isinstance(module, nn.GroupNorm) and module.num_groups > 1):
            kind = type(module).__name__
            raise InputError(f"{name}: expected layers that treat all units alike, got a {kind}; give a specification")
