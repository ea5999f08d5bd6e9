"""How much faster the spectral merges are than the textbook, and how far from it they end.

    python tests/benchmarks/bench_spectral_merges.py [--tower] [--folds] [--device cuda] [--method score|tsv] [--repeats 2]

Matrices are those of a ViT-B/32 visual tower: one layer's four, or with `--tower` twelve layers. The base is random; deltas
have a shared part of rank 64 and singular values that fall like i^-0.7; float32, five experts. The textbook computes a thin
SVD of every delta and one of either concatenation. It is timed in two ways: with torch's own threads inside LAPACK, one matrix
after the other, and with the threads outside, one matrix each. Ours is timed with the threads outside. Repeats alternate, the
least counts. On a busy machine the clock says little, so time of the processors stands beside it. With `--folds` the one layer
takes minutes.

Errors are relative Frobenius distances of the merged delta from a float64 textbook: of TSV, of SCORE, of SCORE with the float64
mask imposed on both; beside them the number of kept-or-dropped decisions that came out differently.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from shiftproof.plugins.score import ScoreConfig, score, score_leave_one_out, trimmed
from shiftproof.strategies.baselines.spectral_merging import tsv, tsv_leave_one_out
from shiftproof.strategies.linalg import canonical_signs, textbook_polar_factor, textbook_triplets
from shiftproof.strategies.subspaces import SharedBasis, shared_basis

LAYER = [(3072, 768), (768, 3072), (2304, 768), (768, 768)]  # largest first
EXPERTS = 5
THREADS = 2
CONFIG = ScoreConfig()
Merge = Callable[[Sequence[Tensor]], object]


def deltas(rows: int, columns: int, experts: int, seed: int, device: str) -> list[Tensor]:
    """What fine-tuning did to one matrix, rounded as a difference of float32 weights is."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(side: int, count: int) -> Tensor:
        columns: Tensor = torch.linalg.qr(torch.randn(side, count, generator=generator)).Q
        return columns

    rank = min(rows, columns)
    values = torch.arange(1, rank + 1) ** -0.7
    base = torch.randn(rows, columns, generator=generator) * 0.03
    left, right = orthonormal(rows, 64), orthonormal(columns, 64)
    found = []
    for _ in range(experts):
        strength = 0.8 + 0.4 * torch.rand(64, generator=generator)
        shared = left * (values[:64] * strength) @ right.T
        own = orthonormal(rows, rank) * values @ orthonormal(columns, rank).T
        found.append(((base + shared + own) - base).to(device))
    return found


def textbook_basis(given: Sequence[Tensor]) -> SharedBasis:
    """Thin SVDs throughout, canonical signs, nothing padded."""
    count = min(given[0].shape) // len(given)
    factors = [canonical_signs(textbook_triplets(delta, count)) for delta in given]
    left, right = (torch.cat([factor[part] for factor in factors], dim=1) for part in (0, 2))
    s = torch.cat([factor.s for factor in factors])
    return SharedBasis(textbook_polar_factor(left), textbook_polar_factor(right), s, len(s))


def textbook_score(given: Sequence[Tensor]) -> Tensor:
    """Algorithm 1."""
    basis = textbook_basis(given)
    return put_together(basis, (trimmed(basis.project(delta), basis.rank, len(given), CONFIG) for delta in given))


def textbook_tsv(given: Sequence[Tensor]) -> Tensor:
    """TSV-M."""
    basis = textbook_basis(given)
    return (basis.left * basis.s) @ basis.right.T


def ours_score(given: Sequence[Tensor]) -> Tensor:
    """SCORE."""
    return score(given, CONFIG)


def score_folds(given: Sequence[Tensor]) -> list[Tensor]:
    """SCORE, every domain held out in turn."""
    return list(score_leave_one_out(given, CONFIG))


def tsv_folds(given: Sequence[Tensor]) -> list[Tensor]:
    """TSV-M, every domain held out in turn."""
    return list(tsv_leave_one_out(given))


def textbook_folds(merge: Merge) -> Merge:
    """Leave-one-out, fold by fold."""
    return lambda given: [merge([one for at, one in enumerate(given) if at != out]) for out in range(len(given))]


def each_alone(work: Merge, matrices: Sequence[list[Tensor]]) -> None:
    """One matrix after the other, with torch's threads inside."""
    torch.set_num_threads(THREADS)
    for given in matrices:
        work(given)


def side_by_side(work: Merge, matrices: Sequence[list[Tensor]]) -> None:
    """A thread a matrix, one torch thread in each."""
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS, initializer=lambda: torch.set_num_threads(1)) as pool:
        list(pool.map(work, matrices))


def seconds(run: Callable[[], object], device: str) -> tuple[float, float]:
    """By the clock, and of the processors."""
    clock, processors = time.perf_counter(), time.process_time()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - processors


def fastest(runs: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, tuple[float, float]]:
    """The least of alternating repeats of each, by the clock and of the processors."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: (min(clock for clock, _ in found), min(busy for _, busy in found)) for name, found in times.items()}


def products(shape: tuple[int, int], with_projections: bool) -> tuple[float, float]:
    """GFLOP in (float32, float64) of the products on our route for one matrix; of a Gram matrix half is computed."""
    long, short = max(shape), min(shape)
    rank = short // EXPERTS * EXPERTS
    double = EXPERTS * long * short**2 + (long + short) * rank**2
    single = 2 * long * short * rank  # from one side's vectors to the other's
    single += 4 * rank**3 + 2 * (long + short) * rank**2  # two inverse roots, and their products with the bases
    single += 2 * long * short * rank  # the way back
    if with_projections:
        single += EXPERTS * (2 * long * short * rank + 2 * short * rank**2) + 2 * short * rank**2
    return single / 1e9, double / 1e9


def rate(dtype: torch.dtype, device: str) -> float:
    """GFLOP a second in a product of (768, 3072) and (3072, 768) with one thread, the fastest of twenty."""
    torch.set_num_threads(1)
    left, right = (torch.randn(shape, dtype=dtype, device=device) for shape in ((768, 3072), (3072, 768)))
    return 2 * 768 * 768 * 3072 / 1e9 / min(seconds(lambda: left @ right, device)[0] for _ in range(20))


def kept(basis: SharedBasis, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(rank, rank) the projection of a delta, and where the trim keeps it."""
    rank = basis.rank
    projection = basis.project(delta)[:rank, :rank].contiguous()
    return projection, trimmed(projection.clone(), rank, EXPERTS, CONFIG) != 0


def put_together(basis: SharedBasis, projections: Iterable[Tensor]) -> Tensor:
    """U_perp Sigma V_perp^T."""
    return basis.left[:, : basis.rank] @ sum(projections, torch.zeros(())) @ basis.right[:, : basis.rank].T


def print_errors(given: list[Tensor]) -> None:
    """Distances of ours and of the float32 textbook from the float64 textbook."""
    exact = [delta.double() for delta in given]
    reference = textbook_basis(exact)
    decided = [kept(reference, delta) for delta in exact]
    of_tsv = (reference.left * reference.s) @ reference.right.T
    of_score = put_together(reference, (projection * mask for projection, mask in decided))
    for name, basis in (("ours", shared_basis(given)), ("textbook", textbook_basis(given))):
        own = [kept(basis, delta) for delta in given]
        flips = [int((mask != right).sum()) for (_, mask), (_, right) in zip(own, decided, strict=True)]
        same_mask = put_together(basis, (one * right for (one, _), (_, right) in zip(own, decided, strict=True)))
        free = put_together(basis, (one * mask for one, mask in own))
        tsv_error = distance((basis.left * basis.s) @ basis.right.T, of_tsv)
        print(
            f"  {name:9}TSV {tsv_error:.1e}   SCORE {distance(free, of_score):.1e}"
            f"   with the same mask {distance(same_mask, of_score):.1e}   flips {sum(flips)} of {len(flips) * basis.rank**2}"
        )


def distance(ours: Tensor, expected: Tensor) -> float:
    """Relative, Frobenius."""
    return float((ours.double() - expected).norm() / expected.norm())


def compare(name: str, ours: Merge, textbook: Merge, matrices: Sequence[list[Tensor]], options: argparse.Namespace) -> None:
    """Print times of ours and of the textbook, and how far ours is from its products."""
    runs = {
        "ours, threads outside": lambda: side_by_side(ours, matrices),
        "textbook, threads outside": lambda: side_by_side(textbook, matrices),
        "textbook, threads inside": lambda: each_alone(textbook, matrices),
    }
    times = fastest(runs, options.repeats, options.device)
    mine = times["ours, threads outside"]
    print(f"{name}: ours {mine[0]:.2f} s by the clock, {mine[1]:.2f} s of the processors")
    for run in list(runs)[1:]:
        clock, busy = times[run]
        print(f"  {run}: {clock:.2f} s ({clock / mine[0]:.2f} x), {busy:.2f} s of the processors ({busy / mine[1]:.2f} x)")


def print_floor(is_score: bool, matrices: Sequence[list[Tensor]], device: str) -> None:
    """How long the products alone would take at the measured rate."""
    rates = [rate(dtype, device) for dtype in (torch.float32, torch.float64)]
    amounts = [products((given[0].shape[0], given[0].shape[1]), is_score) for given in matrices]
    single, double = (sum(amount[part] for amount in amounts) for part in (0, 1))
    floor = (single / rates[0] + double / rates[1]) / (THREADS if device == "cpu" else 1)
    print(
        f"  products: {single:.0f} GFLOP in float32 at {rates[0]:.0f} a second, {double:.0f} in float64 at {rates[1]:.0f}: "
        f"{floor:.2f} s on all threads"
    )


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", action="store_true", help="twelve layers instead of one")
    parser.add_argument("--folds", action="store_true", help="leave-one-out over six domains instead of one merge")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--method", choices=("score", "tsv"), action="append")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    layers = 12 if options.tower else 1
    experts = EXPERTS + 1 if options.folds else EXPERTS
    shapes = [shape for shape in LAYER for _ in range(layers)]
    matrices = [deltas(*shape, experts, seed, options.device) for seed, shape in enumerate(shapes)]
    print(f"{len(matrices)} matrices, {experts} experts, load average before {os.getloadavg()[0]:.2f}")
    for name in options.method or ("score", "tsv"):
        is_score = name == "score"
        textbook: Merge = textbook_score if is_score else textbook_tsv
        if options.folds:
            compare(f"{name}, six folds", score_folds if is_score else tsv_folds, textbook_folds(textbook), matrices, options)
        else:
            compare(name, ours_score if is_score else tsv, textbook, matrices, options)
            print_floor(is_score, matrices, options.device)
    if not options.folds:
        for shape, given in list(zip(shapes, matrices, strict=True))[::layers]:
            print(f"{shape[0]} x {shape[1]}, distance from the float64 textbook")
            print_errors(given)
    print(f"load average after {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
