"""Aligning two ViT-B/16 visual towers of random weights, beside the straightforward way.

    python tests/benchmarks/bench_transport.py [--depth 12] [--threads 2] [--sweeps 1] [--whole] [--residual shared]

The straightforward way visits every permutation at every sweep, with a dense product for each of its axes and the singular
values of all heads computed anew. It goes through the same permutations, sweep by sweep, so a few of its sweeps are timed and
the rest is counted at their mean (`--whole` runs them all).
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch

from shiftproof.benchmark.experiences import StateDict
from shiftproof.benchmark.transporting.architectures import derive
from shiftproof.benchmark.transporting.specification import PermutationSpec
from shiftproof.strategies.transport.assignment import assign, units
from shiftproof.strategies.transport.attention import compose
from shiftproof.strategies.transport.matching import MatchConfig, Matching

WIDTH, HEADS, CLASSES = 768, 12, 512


def tower(depth: int, seed: int) -> StateDict:
    """A visual tower under open_clip's names."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    state = {
        "conv1.weight": drawn(WIDTH, 3, 16, 16),
        "class_embedding": drawn(WIDTH),
        "positional_embedding": drawn(197, WIDTH),
        "proj": drawn(WIDTH, CLASSES),
    }
    blocks = [f"transformer.resblocks.{place}" for place in range(depth)]
    for norm in ("ln_pre", "ln_post", *(f"{block}.{norm}" for block in blocks for norm in ("ln_1", "ln_2"))):
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + drawn(WIDTH), drawn(WIDTH)
    for block in blocks:
        state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"] = drawn(3 * WIDTH, WIDTH), drawn(3 * WIDTH)
        for layer, rows, columns in (
            ("attn.out_proj", WIDTH, WIDTH),
            ("mlp.c_fc", 4 * WIDTH, WIDTH),
            ("mlp.c_proj", WIDTH, 4 * WIDTH),
        ):
            state[f"{block}.{layer}.weight"], state[f"{block}.{layer}.bias"] = drawn(rows, columns), drawn(rows)
    return {f"visual.{name}": tensor for name, tensor in state.items()}


class Straightforward(Matching):
    """No singular value is kept, no visit is spared, and heads are blocks cut out of one product of all units."""

    def sweep(self) -> bool:
        """One sweep in the order of depth; True if it improved something."""
        self.stale = set(self.specification.sizes)
        improved = False
        for name in self.specification.sizes:
            if name in self.specification.heads:
                self.orders[name] = self._inter_head(name)
            improved |= self._visit(0, name)
            self.stale = set(self.specification.sizes)
        return improved

    def similarity(self, name: str, order: torch.Tensor) -> torch.Tensor:
        """A dense product for every axis."""
        total = super().similarity(name, torch.zeros(1, dtype=torch.int64))
        groups = len(order)
        if groups == 1:
            return total
        size = total.shape[1] // groups
        blocks = total.reshape(groups, size, groups, size)
        return torch.stack([blocks[place, :, head] for place, head in enumerate(order.tolist())])

    def _inter_head(self, name: str) -> torch.Tensor:
        """By a singular value decomposition of every head."""
        count = self.specification.heads[name]
        distance = torch.zeros(count, count)
        for slot in self._projections(name):
            ours, theirs = (
                torch.linalg.svdvals(units(state[slot.tensor], slot).reshape(count, slot.size // count, -1))
                for state in (self.target, self.source)
            )
            distance += torch.linalg.vector_norm(ours[:, None] - theirs, dim=2)
        return assign(-distance)


def straightforward(
    source: StateDict, target: StateDict, spec: PermutationSpec, most: int
) -> tuple[float, int, Straightforward]:
    """Seconds and number of the sweeps that were run, and the state they left."""
    matching = Straightforward(source, target, spec, MatchConfig())
    for name, count in spec.heads.items():
        matching.orders[name] = matching._inter_head(name)
        size = spec.sizes[name] // count
        matching.permutations[name] = compose(matching.orders[name], torch.arange(size).expand(count, -1))
    started, done = time.perf_counter(), 0
    while done < most:
        done += 1
        if not matching.sweep():
            break
    return time.perf_counter() - started, done, matching


def megabytes() -> float:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print seconds, sweeps and shares of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12, help="blocks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sweeps", type=int, default=1, help="of the straightforward way that are timed")
    parser.add_argument("--whole", action="store_true", help="run the straightforward way to its end")
    parser.add_argument("--residual", choices=("segments", "shared"), default="segments")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source, target = tower(options.depth, 1), tower(options.depth, 2)
    spec = derive({name: tuple(tensor.shape) for name, tensor in source.items()}, HEADS)
    spec = spec if options.residual == "segments" else spec.shared()
    print(f"load {os.getloadavg()[0]:.1f}, {options.threads} threads, {options.depth} blocks, residual {options.residual}")
    size = sum(tensor.numel() * 4 for tensor in source.values()) / 1e6
    before = megabytes()
    started = time.perf_counter()
    found = Matching(source, target, spec, MatchConfig()).run()
    ours, search = time.perf_counter() - started, found.search
    parts = ", ".join(f"{what} {seconds:.1f}" for what, seconds in search.seconds.items())
    print(f"ours: {ours:.1f} s, {search.sweeps} sweeps, {search.visits} visits of {search.sweeps * len(spec.sizes)} ({parts})")
    largest = max(spec.sizes.values()) ** 2 * 4 / 1e6
    print(
        f"memory: {megabytes() - before:.0f} MB above two towers of {size:.0f} MB; the largest similarity has {largest:.0f} MB"
    )
    most = search.sweeps if options.whole else options.sweeps
    seconds, done, plain = straightforward(source, target, spec, most)
    whole = seconds / done * search.sweeps
    how = "run to the end" if done == search.sweeps else f"{done} of {search.sweeps} sweeps run, the rest counted at their mean"
    print(f"straightforward: {whole:.1f} s ({how})")
    if done == search.sweeps:
        print(f"objective: ours {search.objective[-1]:.3f}, straightforward {plain.objective():.3f}")
    print(f"ratio {whole / ours:.2f}x (wanted 5x)")


if __name__ == "__main__":
    main()
