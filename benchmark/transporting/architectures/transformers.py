"""The block that Transformers are made of, whatever its parts are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.drafting import FIXED, Draft
from shiftproof.benchmark.transporting.specification import Axis, Run, check_heads


@dataclass(frozen=True)
class Block:
    """What a block calls its parts, below its own prefix; parts that are not there are passed over.

    Attributes:
        out: Output projection of the attention.
        first, second: Linear maps of the MLP.
        fused: (weight, bias) with queries, keys and values one after another along the output.
        separate: Three linear maps in their place.
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


def add_block(draft: Draft, block: Block, prefix: str, stream: tuple[str, str, str], heads: int) -> None:
    """Add a block.

    Permutations as in thesis section 8.2.1: one for queries, keys, values and what the output projection reads; one for the
    stream after the attention; one for the hidden units; one for the stream after the block.

    Args:
        stream: Permutations of the residual stream before the block, between attention and MLP, and after the block.

    Raises:
        InputError: If the number of heads is not known or does not divide the width of the attention.
    """
    before, middle, after = stream
    attention, hidden = draft.unit(f"{prefix}attention"), draft.unit(f"{prefix}hidden")
    draft.heads[attention] = _checked(heads, draft, f"{prefix}{block.out}")
    _norms(draft, prefix, block.entry, before)
    for name in block.separate or ():
        draft.layer(f"{prefix}{name}", attention, before)
    if block.fused:
        thrice: Axis = (Run(attention),) * 3
        draft.tensor(f"{prefix}{block.fused[0]}", thrice, before)
        draft.tensor(f"{prefix}{block.fused[1]}", thrice)
    draft.layer(f"{prefix}{block.out}", middle, attention)
    _norms(draft, prefix, block.between, middle)
    draft.layer(f"{prefix}{block.first}", hidden, middle)
    draft.layer(f"{prefix}{block.second}", after, hidden)
    _norms(draft, prefix, block.exit, after)


def add_blocks(draft: Draft, block: Block, start: str, stream: str, default: int = 0) -> str:
    """Add the blocks "start0.", "start1." and so on, and their residual stream as a chain.

    Args:
        stream: The permutation of the stream before the first one; `FIXED` leaves all of it as it is.
        default: Attention heads where nobody says how many there are.

    Returns:
        The permutation of the stream after the last one.
    """
    chain = [stream]
    for prefix in draft.numbered(start):
        middle, after = (draft.unit(f"{prefix}{what}") if stream else FIXED for what in ("middle", "stream"))
        heads = draft.count_heads(draft.prefix + prefix) or default
        add_block(draft, block, prefix, (chain[-1], middle, after), heads)
        chain += [middle, after]
    if stream:
        draft.chains.append(tuple(chain))
    return chain[-1]


def _checked(heads: int, draft: Draft, out: str) -> int:
    width, name = draft.shape(f"{out}.weight")[-1], f"{draft.prefix}{out}"
    if not heads:
        raise InputError(
            f"{name}: expected a number of heads, which shapes do not tell; give it with --heads or in a specification"
        )
    check_heads(heads, width, name)
    return heads


def _norms(draft: Draft, prefix: str, names: Sequence[str], units: str) -> None:
    for name in names:
        draft.norm(f"{prefix}{name}", units)
        draft.tensor(f"{prefix}{name}.gamma", units)  # a LayerScale (Touvron et al., arXiv:2103.17239)
