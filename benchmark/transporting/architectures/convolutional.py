"""Residual networks, and layers that follow one another."""

from __future__ import annotations

import re

from shiftproof.benchmark.errors import InputError
from shiftproof.benchmark.transporting.architectures.readers import add_readers, has_readers
from shiftproof.benchmark.transporting.drafting import FIXED, Draft

NUMBERED = re.compile(r"((?:.*\.)?)(\d+)\.(?:weight|bias|running_mean|running_var|num_batches_tracked)")


def resnet(draft: Draft) -> None:
    """`torchvision.models.ResNet` with basic blocks or bottlenecks, and timm's of the same names."""
    blocks = [prefix for stage in range(1, 5) for prefix in draft.numbered(f"layer{stage}.")]
    _residual(draft, "conv1", "bn1", blocks)


def small_resnet(draft: Draft) -> None:
    """`SmallResNet`, whose blocks are torchvision's."""
    _residual(draft, "stem", "norm", draft.numbered("stages."))


def _residual(draft: Draft, stem: str, norm: str, blocks: list[str]) -> None:
    """A stem and its blocks. The residual stream begins anew where a block has a layer in its shortcut."""
    chain = [draft.unit("stream")]
    draft.layer(stem, chain[0], FIXED)
    _batch_norm(draft, norm, chain[0])
    for prefix in blocks:
        after = draft.unit(f"{prefix}stream")
        _residual_block(draft, prefix, chain[-1], after)
        if draft.has(f"{prefix}downsample.0.weight"):
            draft.chains.append(tuple(chain))
            chain = []
        chain.append(after)
    draft.chains.append(tuple(chain))
    add_readers(draft, chain[-1])


def _residual_block(draft: Draft, prefix: str, before: str, after: str) -> None:
    count = 3 if draft.has(f"{prefix}conv3.weight") else 2
    units = before
    for number in range(1, count + 1):
        rows = after if number == count else draft.unit(f"{prefix}hidden{number}")
        draft.layer(f"{prefix}conv{number}", rows, units)
        _batch_norm(draft, f"{prefix}bn{number}", rows)
        units = rows
    draft.layer(f"{prefix}downsample.0", after, before)
    draft.norm(f"{prefix}downsample.1", after)


def _batch_norm(draft: Draft, name: str, units: str) -> None:
    """A norm that treats every unit alone: others (of groups, say) have the same names but no running statistics."""
    if not draft.has(f"{name}.running_var"):
        raise InputError(f"{draft.prefix}{name}: expected running statistics of a batch norm, got none; give a specification")
    draft.norm(name, units)


def stacks(names: list[str]) -> list[str]:
    """Prefixes of tensors that are numbered as those of a `nn.Sequential` are; heads of tasks, which are too, are left out."""
    found = dict.fromkeys(match[1] for name in names if (match := NUMBERED.fullmatch(name)))
    return [prefix for prefix in found if prefix != "heads." and not prefix.endswith(".heads.")]


def stack(draft: Draft) -> None:
    """`nn.Sequential` of linear maps, convolutions and norms, which is read in the order of its numbers; and `SmallConvNet`.

    Norms are taken to treat every unit alone. The last layer's units stay as they are unless a head reads them.
    """
    matches = [NUMBERED.fullmatch(name) for name in draft.shapes]
    names = [str(number) for number in sorted({int(m[2]) for m in matches if m and m[1] == draft.prefix})]
    layers = [name for name in names if _is_layer(draft, name)]
    units, has_maps = FIXED, False
    for name in names:
        shape = draft.shape(f"{name}.weight")
        reads = draft.flattened(units, shape[1 if name in layers else 0]) if has_maps else units
        if name in layers:
            units = FIXED if name == layers[-1] and not has_readers(draft) else draft.unit(name)
            has_maps = len(shape) > 2
            draft.layer(name, units, reads)
        else:
            draft.norm(name, reads)
    add_readers(draft, units, has_maps=has_maps)


def _is_layer(draft: Draft, name: str) -> bool:
    """A weight with rows and columns. A norm's bias has the shape of its weight, however many axes it has."""
    shape = draft.shape(f"{name}.weight")
    return len(shape) > 1 and not (draft.has(f"{name}.bias") and len(draft.shape(f"{name}.bias")) > 1)
