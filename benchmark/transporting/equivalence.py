"""The numerical check of a specification: renumbered units leave the function as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.specification import NAMED, Permutations, PermutationSpec

SEED = 0  # of the permutations that are tried


def check_equivalence(
    model: nn.Module, specification: PermutationSpec, inputs: tuple[Any, ...], tolerance: float = 1e-5
) -> float:
    """Apply a random permutation of a specification to a module, with one permutation a residual stream.

    The module is evaluated without dropout and is left as it was. Where the specification says that the output carries a
    permutation, it is looked for along the last axis of the first tensor that the module returns.

    Args:
        inputs: Positional arguments of the module.
        tolerance: Of the largest difference of an output, relative to the largest output; the default is one for float32.

    Returns:
        The largest relative difference.

    Raises:
        InputError: If it exceeds the tolerance: the line names permutations that change the function. Also if the outputs are
            all 0 or not finite, which tells nothing.
    """
    odd = sorted(specification.axes.keys() ^ model.state_dict().keys())
    if odd:
        raise InputError(f"specification: expected one for the tensors of this model, got others ({', '.join(odd[:NAMED])})")
    plain = specification.shared()
    permutations = plain.random(torch.Generator().manual_seed(SEED))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        expected = _outputs(model, plain, {}, inputs)
        _check_outputs(expected)
        difference = _difference(model, plain, permutations, inputs, expected)
        if not difference <= tolerance:
            alone = {name: _difference(model, plain, {name: p}, inputs, expected) for name, p in permutations.items()}
            wrong = sorted((name for name in alone if not alone[name] <= tolerance), key=lambda name: -alone[name])
            named = ", ".join(wrong[:NAMED]) or "several together"
            raise InputError(
                f"specification: expected the same outputs to {tolerance:g} under any permutation, got a difference of "
                f"{difference:.2g}; look at the axes of {named}"
            )
    finally:
        for module, was in training.items():
            module.training = was
    return difference


def _difference(
    model: nn.Module,
    specification: PermutationSpec,
    permutations: Permutations,
    inputs: tuple[Any, ...],
    expected: Sequence[Tensor],
) -> float:
    found = _outputs(model, specification, permutations, inputs)
    pairs = zip(expected, found, strict=True)
    return max(((after - before).abs().max() / before.abs().max().clamp(min=_tiny(before))).item() for before, after in pairs)


def _outputs(
    model: nn.Module, specification: PermutationSpec, permutations: Permutations, inputs: tuple[Any, ...]
) -> list[Tensor]:
    """What the permuted module returns, with its units where they were."""
    state = specification.apply(model.state_dict(), permutations)
    with torch.no_grad():
        outputs = list(_tensors(functional_call(model, state, inputs)))
    if specification.output in permutations and outputs:
        back = torch.argsort(permutations[specification.output])
        if outputs[0].shape[-1] != len(back):
            found = tuple(outputs[0].shape)
            raise InputError(f"specification: expected an output with {len(back)} units along its last axis, got {found}")
        outputs[0] = outputs[0].index_select(-1, back.to(outputs[0].device))
    return outputs


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _check_outputs(outputs: Sequence[Tensor]) -> None:
    if not outputs or not all(output.isfinite().all() for output in outputs):
        raise InputError("expected a model that returns finite numbers, got others; give other inputs")
    if not any(output.any() for output in outputs):
        raise InputError("expected outputs other than 0, which tell whether they change; give a head that is not all 0")


def _tiny(output: Tensor) -> float:
    return torch.finfo(output.dtype).tiny
