"""The block that Transformers are made of, whatever its parts are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shiftproof.benchmark.transporting.drafting import Draft
from shiftproof.benchmark.transporting.specification import Axis, Run, check_heads


@dataclass(frozen=True)
class Block:
    """What a block calls its parts, below its own prefix; parts that are not there are passed over.

    Attributes:
        fused: (weight, bias) with queries, keys and values one after another along the output.
        separate: Three linear maps in their place.
        out: Output projection of the attention.
        first, second: Linear maps of the MLP.
        entry: Norms and scales whose units are those of the stream before the block (pre-norm: the first norm).
        between: Those of the stream between attention and MLP (pre-norm: the second norm; post-norm: the first).
        exit: Those of the stream after the block (post-norm: the second norm).
    """

    out: str
    first: str
    second: str
    fused: tuple[str, str] | None = None
    separate: tuple[str, str, str] | None = None
    entry: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    exit: tuple[str, ...] = ()


def add_block(draft: Draft, block: Block, prefix: str, stream: str, heads: int) -> tuple[str, str]:
    """Add a block that reads the residual stream `stream`.

    Permutations as in thesis section 8.2.1: one for queries, keys, values and what the output projection reads; one for the
    stream after the attention; one for the hidden units; one for the stream after the block.

    Returns:
        The permutations of the stream between attention and MLP, and after the block.

    Raises:
        InputError: If the number of heads does not divide the width of the attention.
    """
    attention, middle, hidden, after = (f"{prefix}{what}" for what in ("attention", "middle", "hidden", "stream"))
    check_heads(heads, draft.shape(f"{prefix}{block.out}.weight")[1], f"{draft.prefix}{prefix}{block.out}")
    draft.heads[attention] = heads
    _norms(draft, prefix, block.entry, stream)
    for name in block.separate or ():
        draft.layer(f"{prefix}{name}", attention, stream)
    if block.fused:
        thrice: Axis = (Run(attention),) * 3
        draft.tensor(f"{prefix}{block.fused[0]}", thrice, stream)
        draft.tensor(f"{prefix}{block.fused[1]}", thrice)
    draft.layer(f"{prefix}{block.out}", middle, attention)
    _norms(draft, prefix, block.between, middle)
    draft.layer(f"{prefix}{block.first}", hidden, middle)
    draft.layer(f"{prefix}{block.second}", after, hidden)
    _norms(draft, prefix, block.exit, after)
    return middle, after


def add_blocks(draft: Draft, block: Block, prefixes: Sequence[str], stream: str, heads: int) -> str:
    """Add blocks one after another, and their residual stream as a chain.

    Returns:
        The permutation of the stream after the last one.
    """
    chain = [stream]
    for prefix in prefixes:
        chain += add_block(draft, block, prefix, chain[-1], heads)
    draft.chains.append(tuple(chain))
    return chain[-1]


def _norms(draft: Draft, prefix: str, names: Sequence[str], units: str) -> None:
    for name in names:
        draft.norm(f"{prefix}{name}", units)
        draft.tensor(f"{prefix}{name}.gamma", units)  # a LayerScale (Touvron et al., arXiv:2103.17239)
