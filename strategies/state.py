"""The attributes of a strategy as a checkpoint that loads without executing code, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shiftproof.benchmark import Model, RunContext
from shiftproof.strategies.heads import Heads

PLAIN = (int, float, str, bool, type(None))


def encode(name: str, value: Any) -> dict[str, Any]:
    """A tagged value of tensors, numbers, strings, lists and dicts.

    Raises:
        TypeError: If the value is nothing that a checkpoint can hold; names the attribute.
    """
    if isinstance(value, Tensor):
        return {"is": "tensor", "value": value.detach()}
    if isinstance(value, PLAIN):
        return {"is": "plain", "value": value}
    if isinstance(value, list | tuple):
        items = [encode(f"{name}[{i}]", item) for i, item in enumerate(value)]
        return {"is": "tuple" if isinstance(value, tuple) else "list", "value": items}
    if isinstance(value, dict):
        pairs = [[encode(f"{name} key", key), encode(f"{name}[{key!r}]", item)] for key, item in value.items()]
        return {"is": "dict", "value": pairs}
    if isinstance(value, Heads):
        return {"is": "heads", "purpose": value._purpose, "sizes": value.sizes(), "value": value.state_dict()}
    if isinstance(value, Model):
        trained = any(parameter.requires_grad for parameter in value.parameters())
        return {"is": "model", "training": value.training, "trained": trained, "value": value.state_dict()}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return {"is": "object", "value": value.state_dict()}
    raise TypeError(
        f"attribute {name!r} holds a {type(value).__name__}, which a checkpoint cannot: expected tensors, numbers, strings, "
        "lists, dicts, models of context.new_model(), Heads, or an object with state_dict and load_state_dict"
    )


def decode(name: str, tagged: dict[str, Any], current: Any, context: RunContext) -> Any:
    """The value of an attribute; objects that exist are loaded in place.

    Args:
        current: What the attribute holds now, None if nothing.

    Raises:
        TypeError: If an object would have to be made that only the strategy knows how to make.
    """
    kind, value = tagged["is"], tagged["value"]
    if kind == "tensor":
        return value.to(context.device) if value.device != context.device else value
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
        return heads
    if kind == "model":
        model = current if isinstance(current, Model) else context.new_model()
        model.load_state_dict(value)
        return model.train(tagged["training"]).requires_grad_(tagged["trained"])
    if current is None:
        raise TypeError(f"attribute {name!r}: make it in __init__, so that a checkpoint can be loaded into it")
    current.load_state_dict(value)
    return current
