"""k-means pseudo-labels: the clusters that BPA, ClusterFix, LwS and George take for groups nobody annotated."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from shiftproof.benchmark.errors import InputError

Distance = Literal["cosine", "euclidean"]
Backend = Literal["auto", "faiss", "sklearn"]
Array = NDArray[Any]

_CHUNK = 8192  # rows whose differences to a centre are held at a time
_SAME = 1e-12  # squared distance, relative to the longest row, below which two rows count as one
_STILL = 1e-6  # largest difference of an entry, below which a centre of unit length has not moved


@dataclass(frozen=True, eq=False)
class Clustering:
    """A partition without empty clusters.

    Attributes:
        assignment: (N,) int64, values in [0, K'); every cluster has at least one member.
        centres: (K', D) float32; of unit length under the cosine distance.
        inertia: Sum over rows of the squared distance to their centre; under "cosine" of the normalised rows, 2 (1 - cos).
    """

    assignment: Tensor
    centres: Tensor
    inertia: float


@dataclass(frozen=True, eq=False)
class ClassClusters:
    """Clusters found within each class.

    Attributes:
        ids: (N,) int64, unique over classes: the clusters of smaller classes come first.
        local: (N,) int64, cluster within the class of the sample, in [0, counts[y]).
        counts: Number of clusters of each class; 0 for a class without samples.
    """

    ids: Tensor
    local: Tensor
    counts: tuple[int, ...]


def kmeans(
    features: Tensor,
    k: int,
    seed: int,
    *,
    distance: Distance = "cosine",
    iterations: int = 50,
    restarts: int = 4,
    backend: Backend = "auto",
) -> Clustering:
    """Lloyd's k-means from k-means++ seeds (Arthur & Vassilvitskii, SODA 2007), best of several restarts.

    "cosine" is spherical k-means: rows and centres have unit length, so scaling a row by a positive number changes nothing.
    Fewer than k clusters come back where there are fewer than k distinct rows, or where a cluster ends up empty: during
    the iterations the library re-seeds empty clusters, and what is empty at the end is dropped and the rest renumbered.
    One thread, and the limits of before are restored. The same input and seed give the same result on the same machine.

    Args:
        features: (N, D) float32, on any device.
        k: Number of clusters wanted, at least 1.
        seed: Any integer; nothing global is drawn from.
        distance: Cosine (BPA, LwS) or Euclidean.
        iterations: Of Lloyd's algorithm.
        restarts: The run with the least inertia wins, the first of equals.
        backend: "auto" is faiss where it is installed and scikit-learn elsewhere. Seeds are the same for both.

    Returns:
        The clustering, on the CPU.

    Raises:
        InputError: If features are not a non-empty finite matrix, a count is below 1, or the backend is not installed.
    """
    if min(k, iterations, restarts) < 1:
        raise InputError(f"expected k, iterations and restarts of at least 1, got {k}, {iterations} and {restarts}")
    rows, solve = _rows(features, distance), _backend(backend)
    with threadpool_limits(limits=1):
        runs = (_run(rows, k, rng, solve, iterations, distance) for rng in _generators(seed, restarts))
        # Runs that differ in rounding only are the same partition under other numbers; the first keeps its numbers.
        return reduce(lambda best, run: run if run.inertia < (1 - 1e-6) * best.inertia else best, runs)


def cluster_per_class(
    features: Tensor,
    y: Tensor,
    k: int,
    seed: int,
    *,
    distance: Distance = "cosine",
    iterations: int = 50,
    restarts: int = 4,
    backend: Backend = "auto",
) -> ClassClusters:
    """k-means within each class, as the pseudo-labels of BPA, ClusterFix (thesis 4.2.1) and LwS (thesis 5.3.1).

    Args:
        features: (N, D) float32.
        y: (N,) int64, targets from 0.
        k: Clusters a class, at most.
        seed: As in `kmeans`; each class has its own stream.
        distance: As in `kmeans`, like the arguments that follow.
        iterations: As in `kmeans`.
        restarts: As in `kmeans`.
        backend: As in `kmeans`.

    Raises:
        InputError: If features and y differ in length, or as in `kmeans`.
    """
    run = partial(kmeans, distance=distance, iterations=iterations, restarts=restarts, backend=backend)
    return _per_class(features, y, seed, lambda rows, class_seed: run(rows, k, class_seed))


def overcluster_per_class(
    features: Tensor,
    y: Tensor,
    candidates: Sequence[int],
    factor: int,
    seed: int,
    *,
    distance: Distance = "cosine",
    backend: Backend = "auto",
) -> ClassClusters:
    """George's groups (Sohoni et al., NeurIPS 2020, arXiv:2011.12945): `factor` times the k of best silhouette, class by class.

    Deviations from the original, which the thesis does not go into (Eq. 4.3): k-means on the features as they come instead
    of a Gaussian mixture on a UMAP embedding, and all of the finer clusters are kept.

    Args:
        features: (N, D) float32.
        y: (N,) int64, targets from 0.
        candidates: Values of k to try, as in `silhouette_k`.
        factor: Over-clustering; 1 takes the k of the silhouette as it is.
        seed: As in `kmeans`.
        distance: As in `kmeans`.
        backend: As in `kmeans`.

    Raises:
        InputError: If `factor` is below 1, or as in `kmeans` and `silhouette_k`.
    """
    if factor < 1:
        raise InputError(f"expected an over-clustering factor of at least 1, got {factor}")

    def run(rows: Tensor, class_seed: int) -> Clustering:
        k = silhouette_k(rows, candidates, class_seed, distance=distance, backend=backend)
        return kmeans(rows, factor * k, class_seed, distance=distance, backend=backend)

    return _per_class(features, y, seed, run)


def silhouette_k(
    features: Tensor,
    candidates: Sequence[int],
    seed: int,
    *,
    distance: Distance = "cosine",
    backend: Backend = "auto",
    sample: int = 2000,
) -> int:
    """The number of clusters with the largest mean silhouette (Rousseeuw, 1987); the smallest of equals.

    Args:
        features: (N, D) float32.
        candidates: Values of k to try. A silhouette needs 2 to N - 1 clusters; candidates outside are passed over.
        seed: As in `kmeans`; it also picks the sample.
        distance: As in `kmeans`.
        backend: As in `kmeans`.
        sample: The silhouette is taken over at most so many rows, because it is quadratic in them.

    Returns:
        A member of `candidates` (or the number of distinct rows, where that is smaller); 1 if no candidate can be scored.

    Raises:
        InputError: If `candidates` is empty, or as in `kmeans`.
    """
    if not candidates:
        raise InputError("expected at least one number of clusters to try, got none")
    score = importlib.import_module("sklearn.metrics").silhouette_score
    rows = _rows(features, distance)
    chosen = next(_generators(seed, 1)).permutation(len(rows))[:sample]
    scores: dict[int, float] = {}
    for k in sorted(candidates):
        labels = kmeans(features, k, seed, distance=distance, backend=backend).assignment.numpy()
        with threadpool_limits(limits=1):
            if 2 <= len(np.unique(labels[chosen])) < len(chosen):
                scores.setdefault(int(labels.max()) + 1, float(score(rows[chosen], labels[chosen], metric=distance)))
    return max(scores, key=lambda k: scores[k], default=1)


def _per_class(features: Tensor, y: Tensor, seed: int, run: Callable[[Tensor, int], Clustering]) -> ClassClusters:
    if y.ndim != 1 or len(features) != len(y) or len(y) == 0 or int(y.min()) < 0:
        got = f"{tuple(features.shape)} and {tuple(y.shape)}"
        raise InputError(f"expected (N, D) features and (N,) targets counted from 0, N > 0, got {got}")
    features, y = features.detach().cpu(), y.cpu()
    seeds = [int(rng.integers(2**63)) for rng in _generators(seed, int(y.max()) + 1)]
    local, counts = torch.zeros_like(y), [0] * len(seeds)
    for label in np.unique(y.numpy()).tolist():
        members = (y == label).nonzero().squeeze(1)
        found = run(features[members], seeds[label])
        local[members], counts[label] = found.assignment, len(found.centres)
    offsets = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    return ClassClusters(offsets[y] + local, local, tuple(counts))


def _rows(features: Tensor, distance: Distance) -> Array:
    if distance not in ("cosine", "euclidean"):
        raise InputError(f"expected distance 'cosine' or 'euclidean', got {distance!r}")
    if features.ndim != 2 or features.numel() == 0 or not bool(features.isfinite().all()):
        raise InputError(f"expected a non-empty (N, D) matrix of finite features, got shape {tuple(features.shape)}")
    rows = features.detach().float().cpu()
    if distance == "cosine":
        # Dividing by the largest entry first keeps rows of tiny or huge length from under- or overflowing.
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        rows = torch.nn.functional.normalize(rows, dim=1)
    return np.ascontiguousarray(rows.numpy())


def _generators(seed: int, count: int) -> Iterator[np.random.Generator]:
    return (np.random.default_rng(child) for child in np.random.SeedSequence(seed % 2**64).spawn(count))


def _run(rows: Array, k: int, rng: np.random.Generator, solve: Any, iterations: int, distance: Distance) -> Clustering:
    centres = solve(rows, _plus_plus(rows, k, rng), iterations, distance)
    if distance == "cosine":
        centres = _unit(centres)
    # |x - c|^2 without |x|^2, which is the same for every centre
    nearest = (np.square(centres).sum(1) - 2 * rows @ centres.T).argmin(1)
    used, assignment = np.unique(nearest, return_inverse=True)
    inertia = sum(_squared_distance(rows[assignment == new], centres[old]).sum() for new, old in enumerate(used))
    kept = np.ascontiguousarray(centres[used], dtype=np.float32)
    return Clustering(torch.from_numpy(assignment.astype(np.int64)), torch.from_numpy(kept), float(inertia))


def _unit(centres: Array) -> Array:
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    found: Array = centres / np.maximum(lengths, np.finfo(np.float32).tiny)
    return found


def _plus_plus(rows: Array, k: int, rng: np.random.Generator) -> Array:
    """(K', D) k-means++ seeds. The libraries' own repeat a row once the distinct ones are used up; this stops there."""
    same = _SAME * float(np.square(rows).sum(1).max())
    chosen = [int(rng.integers(len(rows)))]
    potential = np.full(len(rows), np.inf)
    while len(chosen) < k:
        potential = np.minimum(potential, _squared_distance(rows, rows[chosen[-1]]))
        potential[potential <= same] = 0
        cumulative = potential.cumsum()
        if cumulative[-1] == 0:
            break
        chosen.append(int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")))
    return rows[chosen]


def _squared_distance(rows: Array, centre: Array) -> Array:
    """(N,) float64. Differences first: the expanded square would leave rounding noise where two rows are equal."""
    chunks = (rows[start : start + _CHUNK] - centre for start in range(0, len(rows), _CHUNK))
    return np.concatenate([np.einsum("nd,nd->n", chunk, chunk, dtype=np.float64) for chunk in chunks])


def _backend(name: Backend) -> Any:
    if name not in ("auto", "faiss", "sklearn"):
        raise InputError(f"expected backend 'auto', 'faiss' or 'sklearn', got {name!r}")
    has_faiss = importlib.util.find_spec("faiss") is not None
    if name == "faiss" and not has_faiss:
        raise InputError("expected faiss to be installed, it is not: pip install faiss-cpu, or use backend 'sklearn'")
    # Imported before threads are limited: a library that is loaded later would not be limited.
    if name == "sklearn" or not has_faiss:
        return partial(_sklearn, importlib.import_module("sklearn.cluster"))
    return partial(_faiss, importlib.import_module("faiss"))


def _faiss(faiss: Any, rows: Array, seeds: Array, iterations: int, distance: Distance) -> Array:
    solver = faiss.Kmeans(
        rows.shape[1],
        len(seeds),
        niter=iterations,
        spherical=distance == "cosine",
        min_points_per_centroid=1,  # no warning about small clusters
        max_points_per_centroid=len(rows),  # no sub-sampling
    )
    solver.train(rows, init_centroids=seeds)
    return np.asarray(solver.centroids)


def _sklearn(cluster: Any, rows: Array, seeds: Array, iterations: int, distance: Distance) -> Array:
    def lloyd(centres: Array, steps: int) -> Array:
        # With the seeds given nothing is drawn; the fixed state keeps numpy's global one out of it in other versions, too.
        solver = cluster.KMeans(len(centres), init=centres, n_init=1, max_iter=steps, tol=0.0, random_state=0)
        return np.asarray(solver.fit(rows).cluster_centers_)

    if distance == "euclidean":
        return lloyd(seeds, iterations)
    centres = seeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # after one step a cluster may lie empty that the next one fills
        for _ in range(iterations):  # scikit-learn has no spherical k-means: after each step centres are cut to unit length
            before, centres = centres, _unit(lloyd(centres, 1))
            if np.abs(centres - before).max() <= _STILL:
                break
    return centres
