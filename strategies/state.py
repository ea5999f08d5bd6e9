"""The attributes of a strategy as a checkpoint that loads without executing code, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shiftproof.benchmark import Model, RunContext
from shiftproof.strategies.heads import Heads

PLAIN = (int, float, str, bool, type(None))  # themselves only: a subclass, such as numpy's float64, would come back changed


def encode(name: str, value: Any) -> dict[str, Any]:
    """A tagged value of tensors, numbers, strings, lists and dicts. Tensors are not copied: write it down before going on.

    Raises:
        TypeError: If the value is nothing that a checkpoint can hold; names the attribute.
    """
    if isinstance(value, Tensor):
        trained = value.requires_grad and value.is_leaf
        facts = {"trained": trained, "parameter": isinstance(value, nn.Parameter), "on_cpu": value.device.type == "cpu"}
        return {"is": "tensor", "value": value.detach(), **facts}
    if type(value) in PLAIN:
        return {"is": "plain", "value": value}
    if type(value) in (list, tuple):
        return {"is": type(value).__name__, "value": [encode(f"{name}[{i}]", item) for i, item in enumerate(value)]}
    if type(value) is dict:
        pairs = [[encode(f"{name} key", key), encode(f"{name}[{key!r}]", item)] for key, item in value.items()]
        return {"is": "dict", "value": pairs}
    if isinstance(value, Heads):
        return {"is": "heads", "purpose": value._purpose, "sizes": value.sizes(), **_module_facts(value)}
    if type(value) is Model:
        return {"is": "model", **_module_facts(value)}
    if _is_object(value):
        return {"is": "object", **(_module_facts(value) if isinstance(value, nn.Module) else {"value": value.state_dict()})}
    raise TypeError(
        f"attribute {name!r} holds a {type(value).__name__}, which a checkpoint cannot: expected tensors, numbers, strings, "
        "lists, dicts, models of context.new_model(), Heads, or an object with state_dict and load_state_dict"
    )


def objects(name: str, value: Any) -> Iterator[str]:
    """Where in an attribute there are objects that only the strategy knows how to make: "buffers[0]", for example."""
    if type(value) in (list, tuple):
        for i, item in enumerate(value):
            yield from objects(f"{name}[{i}]", item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from objects(f"{name}[{key!r}]", item)
    elif _is_object(value):
        yield name


def decode(name: str, tagged: dict[str, Any], current: Any, context: RunContext) -> Any:
    """The value of an attribute; objects that exist are loaded in place.

    Args:
        current: What the attribute holds now, None if nothing.

    Raises:
        TypeError: If an object would have to be made that only the strategy knows how to make.
    """
    kind, value = tagged["is"], tagged["value"]
    if kind == "tensor":
        return _tensor(tagged, current, context)
    if kind == "plain":
        return value
    if kind in ("list", "tuple"):
        known = list(current) if isinstance(current, list | tuple) else []
        items = [decode(f"{name}[{i}]", item, known[i] if i < len(known) else None, context) for i, item in enumerate(value)]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        held = current if isinstance(current, dict) else {}
        keys = [decode(name, key, None, context) for key, _ in value]
        return {key: decode(name, item, held.get(key), context) for key, (_, item) in zip(keys, value, strict=True)}
    if kind == "heads":
        heads = current if isinstance(current, Heads) else Heads(context, tagged["purpose"])
        heads.rebuild(tagged["sizes"], value)
        return _with_facts(heads, tagged)
    if kind == "model":
        model = current if type(current) is Model else context.new_model()
        model.load_state_dict(value)
        return _with_facts(model, tagged)
    if current is None:
        raise TypeError(f"attribute {name!r}: make it in __init__, so that a checkpoint can be loaded into it")
    current.load_state_dict(value)
    return _with_facts(current, tagged) if isinstance(current, nn.Module) else current


def _is_object(value: Any) -> bool:
    if isinstance(value, Tensor | Heads) or type(value) is Model:
        return False
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _tensor(tagged: dict[str, Any], current: Any, context: RunContext) -> Tensor:
    tensor: Tensor = tagged["value"].to("cpu" if tagged["on_cpu"] else context.device)
    if not tagged["trained"]:
        return tensor
    if isinstance(current, Tensor) and current.requires_grad and current.shape == tensor.shape:
        with torch.no_grad():
            return current.copy_(tensor)  # in place, for an optimizer that was made for it
    return nn.Parameter(tensor) if tagged["parameter"] else tensor.requires_grad_()


def _module_facts(module: nn.Module) -> dict[str, Any]:
    """Weights, and what else of a module changes during training: which parts are frozen and which rest in evaluation mode."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    resting = [name for name, part in module.named_modules() if not part.training]
    return {"value": module.state_dict(), "frozen": frozen, "resting": resting}


def _with_facts(module: nn.Module, tagged: dict[str, Any]) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in tagged["frozen"])
    for name, part in module.named_modules():
        part.training = name not in tagged["resting"]
    return module
