"""k-means against scikit-learn, planted blobs and invariances."""

from __future__ import annotations

import sys
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_info  # type: ignore[import-untyped]
from torch import Tensor

from shiftproof.benchmark.errors import InputError
from shiftproof.strategies import clustering
from shiftproof.strategies.clustering import (
    Backend,
    Clustering,
    Distance,
    cluster_per_class,
    kmeans,
    overcluster_per_class,
    silhouette_k,
)

BACKENDS: tuple[Backend, ...] = ("faiss", "sklearn")
DISTANCES: tuple[Distance, ...] = ("cosine", "euclidean")


def blobs(clusters: int, each: int, seed: int = 0, dimension: int = 16) -> tuple[Tensor, Tensor]:
    """Tight blobs around orthogonal directions, shuffled: (N, D) rows and (N,) planted ids."""
    generator = torch.Generator().manual_seed(seed)
    planted = torch.arange(clusters).repeat_interleave(each)
    rows = 5 * torch.eye(dimension)[planted] + 0.3 * torch.randn(len(planted), dimension, generator=generator)
    order = torch.randperm(len(planted), generator=generator)
    return rows[order], planted[order]


def agreement(first: Tensor, second: Tensor) -> float:
    return float(adjusted_rand_score(first.numpy(), second.numpy()))


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_planted_blobs_are_found(backend: Backend, distance: Distance) -> None:
    rows, planted = blobs(6, 30)
    found = kmeans(rows, 6, 0, distance=distance, backend=backend)
    assert agreement(found.assignment, planted) == 1.0


@pytest.mark.parametrize("distance", DISTANCES)
def test_faiss_and_sklearn_agree_on_planted_data(distance: Distance) -> None:
    rows, _ = blobs(8, 20, seed=3)
    first, second = (kmeans(rows, 8, 5, distance=distance, backend=backend) for backend in BACKENDS)
    assert agreement(first.assignment, second.assignment) == 1.0
    assert first.inertia == pytest.approx(second.inertia, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inertia_is_within_two_per_cent_of_sklearn_with_ten_starts(backend: Backend, seed: int) -> None:
    rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(seed)).relu()
    reference = KMeans(8, n_init=10, random_state=0).fit(rows.numpy()).inertia_
    assert kmeans(rows, 8, seed, distance="euclidean", backend=backend).inertia <= 1.02 * reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cosine_inertia_is_within_two_per_cent_of_sklearn_on_the_sphere(backend: Backend, seed: int) -> None:
    rows = torch.randn(400, 24, generator=torch.Generator().manual_seed(seed)).relu()
    centres = unit(torch.from_numpy(KMeans(8, n_init=10, random_state=0).fit(unit(rows).numpy()).cluster_centers_))
    reference = float((2 - 2 * unit(rows) @ centres.T).amin(1).sum())
    assert kmeans(rows, 8, seed, backend=backend).inertia <= 1.02 * reference


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_row_is_with_its_nearest_centre_and_inertia_is_the_sum(backend: Backend, distance: Distance) -> None:
    rows = torch.randn(150, 5, generator=torch.Generator().manual_seed(1))
    found = kmeans(rows, 7, 2, distance=distance, backend=backend)
    distances = torch.cdist((unit(rows) if distance == "cosine" else rows).double(), found.centres.double()).square()
    assert torch.equal(distances.argmin(1), found.assignment)
    assert found.inertia == pytest.approx(float(distances.amin(1).sum()), rel=1e-5)
    assert (distance == "euclidean") or torch.allclose(found.centres.norm(dim=1), torch.ones(len(found.centres)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(5))
def test_cosine_ends_where_spherical_k_means_stands_still(backend: Backend, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The mean of a tight cluster of directions is longer than that of a wide one.
    spread = torch.tensor([0.3, 1.0]).repeat_interleave(150).unsqueeze(1)
    rows = 0.7 + spread * torch.randn(300, 3, generator=generator)
    found = kmeans(rows, 6, seed, restarts=1, iterations=300, backend=backend)
    sums = torch.zeros(6, 3).index_add_(0, found.assignment, unit(rows))
    assert torch.allclose(unit(sums), found.centres, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_order_of_rows_does_not_matter_where_clusters_are_apart(backend: Backend, distance: Distance) -> None:
    rows, _ = blobs(5, 25)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(9))
    plain = kmeans(rows, 5, 0, distance=distance, backend=backend).assignment
    shuffled = kmeans(rows[order], 5, 0, distance=distance, backend=backend).assignment
    assert agreement(plain[order], shuffled) == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_ignores_the_length_of_rows(backend: Backend) -> None:
    rows, _ = blobs(5, 25)
    lengths = 10 ** torch.empty(len(rows), 1).uniform_(-15, 15, generator=torch.Generator().manual_seed(0))
    plain, scaled = kmeans(rows, 5, 0, backend=backend), kmeans(rows * lengths, 5, 0, backend=backend)
    assert scaled.inertia == pytest.approx(plain.inertia, rel=1e-5)
    assert torch.equal(plain.assignment, scaled.assignment)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_turning_every_sign_leaves_the_partition(backend: Backend, distance: Distance) -> None:
    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(4))
    plain, turned = (kmeans(sign * rows, 4, 0, distance=distance, backend=backend) for sign in (1, -1))
    assert torch.equal(plain.assignment, turned.assignment)
    assert torch.allclose(plain.centres, -turned.centres, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_directions_are_apart_under_cosine(backend: Backend) -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0], [-3.0, -6.0]])
    assert agreement(kmeans(rows, 2, 0, backend=backend).assignment, torch.tensor([0, 0, 1, 1])) == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_there_are_no_more_clusters_than_distinct_rows(backend: Backend, distance: Distance) -> None:
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).repeat(10, 1)
    found = kmeans(rows, 8, 0, distance=distance, backend=backend)
    assert len(found.centres) == 3
    assert agreement(found.assignment, torch.arange(3).repeat(10)) == 1.0
    assert found.inertia < 1e-10


def test_rows_of_one_direction_count_as_one_under_cosine() -> None:
    rows = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 30).unsqueeze(1)
    assert len(kmeans(rows, 4, 0).centres) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cluster_has_a_member(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        rows = torch.randint(0, 3, (12, 2), generator=generator).float()
        found = kmeans(rows, 8, seed, distance="euclidean", backend=backend)
        assert (found.assignment.bincount(minlength=len(found.centres)) > 0).all()


def test_a_centre_that_ends_up_with_nobody_is_dropped_and_the_rest_renumbered(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, planted = blobs(3, 10)
    solve = clustering._faiss

    def with_a_far_centre(*arguments: Any) -> Any:
        return np.concatenate((np.full((1, 16), -1e3, np.float32), solve(*arguments)))

    monkeypatch.setattr(clustering, "_faiss", with_a_far_centre)
    found = kmeans(rows, 3, 0, distance="euclidean", backend="faiss")
    assert found.assignment.bincount().tolist() == [10, 10, 10]
    assert found.centres.shape == (3, 16)
    assert agreement(found.assignment, planted) == 1.0
    assert torch.allclose(found.centres[found.assignment], rows, atol=2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_seed_decides_and_global_generators_are_left_alone(backend: Backend, distance: Distance) -> None:
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state(), str(np.random.get_state())
    runs = [kmeans(rows, 8, 3, distance=distance, restarts=1, backend=backend) for _ in range(2)]
    other = kmeans(rows, 8, 4, distance=distance, restarts=1, backend=backend)
    assert torch.equal(runs[0].assignment, runs[1].assignment)
    assert torch.equal(runs[0].centres, runs[1].centres)
    assert not torch.equal(runs[0].assignment, other.assignment)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_thread_limits_of_before_are_restored(backend: Backend) -> None:
    faiss.omp_set_num_threads(2)
    before = [library["num_threads"] for library in threadpool_info()]
    kmeans(blobs(3, 10)[0], 3, 0, backend=backend)
    after = [library["num_threads"] for library in threadpool_info()]
    assert faiss.omp_get_max_threads() == 2
    assert before == after
    faiss.omp_set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_thread_does_the_work(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss.omp_set_num_threads(2)
    during: list[int] = []
    seeds = clustering._plus_plus

    def spy(rows: Any, k: int, rng: np.random.Generator) -> Any:
        during.extend(library["num_threads"] for library in threadpool_info())
        return seeds(rows, k, rng)

    monkeypatch.setattr(clustering, "_plus_plus", spy)
    kmeans(blobs(3, 10)[0], 3, 0, backend=backend)
    assert set(during) == {1}
    faiss.omp_set_num_threads(1)


def test_more_restarts_never_raise_the_inertia() -> None:
    rows = torch.randn(120, 4, generator=torch.Generator().manual_seed(2))
    inertia = [kmeans(rows, 10, 0, restarts=restarts).inertia for restarts in (1, 2, 4, 8)]
    assert inertia == sorted(inertia, reverse=True)


def test_sklearn_takes_over_where_faiss_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(100, 6, generator=torch.Generator().manual_seed(2))
    expected = kmeans(rows, 5, 0, backend="sklearn")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert torch.equal(kmeans(rows, 5, 0).centres, expected.centres)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        kmeans(rows, 5, 0, backend="faiss")


@pytest.mark.parametrize(
    ("features", "k", "distance", "backend", "message"),
    [
        (torch.zeros(0, 3), 2, "cosine", "auto", "non-empty"),
        (torch.zeros(5), 2, "cosine", "auto", "matrix"),
        (torch.full((4, 2), torch.nan), 2, "cosine", "auto", "finite"),
        (torch.ones(4, 2), 0, "cosine", "auto", "at least 1"),
        (torch.ones(4, 2), 2, "manhattan", "auto", "'cosine' or 'euclidean'"),
        (torch.ones(4, 2), 2, "cosine", "cuml", "'faiss' or 'sklearn'"),
    ],
)
def test_wrong_input_is_one_line(features: Tensor, k: int, distance: Distance, backend: Backend, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kmeans(features, k, 0, distance=distance, backend=backend)


def test_a_row_of_zeros_has_a_place_under_cosine() -> None:
    rows = torch.cat((torch.zeros(2, 4), blobs(2, 5, dimension=4)[0]))
    found = kmeans(rows, 3, 0)
    assert found.assignment[0] == found.assignment[1]
    assert bool(found.centres.isfinite().all())


def test_clusters_of_classes_are_those_of_each_class_alone() -> None:
    rows, planted = blobs(6, 20)
    y = planted % 2
    found = cluster_per_class(rows, y, 3, seed=0)
    assert agreement(found.ids, planted) == 1.0
    assert found.counts == (3, 3)
    assert torch.equal(found.ids, found.local + 3 * y)


def test_ids_of_classes_never_meet_and_local_ids_stay_below_the_count() -> None:
    rows = torch.cat((torch.zeros(4, 3), torch.randn(30, 3, generator=torch.Generator().manual_seed(0))))
    y = torch.tensor([0] * 4 + [3] * 20 + [1] * 10)
    found = cluster_per_class(rows, y, 8, seed=1, distance="euclidean")
    assert found.counts[0] == 1
    assert found.counts[2] == 0
    assert torch.equal(found.ids, found.local + torch.tensor([0, 1, 1 + found.counts[1], 1 + found.counts[1]])[y])
    assert sorted(set(found.ids.tolist())) == list(range(sum(found.counts)))


def test_classes_draw_from_streams_of_their_own() -> None:
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    y = torch.arange(2).repeat_interleave(60)
    found = cluster_per_class(rows, y, 6, seed=0, restarts=1)
    assert not torch.equal(found.local[:60], found.local[60:])


def test_targets_of_another_length_are_refused() -> None:
    with pytest.raises(InputError, match="targets"):
        cluster_per_class(torch.ones(4, 2), torch.zeros(3, dtype=torch.int64), 2, 0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("planted", [2, 3, 5])
def test_the_silhouette_finds_the_planted_number(distance: Distance, planted: int) -> None:
    rows, _ = blobs(planted, 25)
    assert silhouette_k(rows, range(2, 8), 0, distance=distance) == planted
    assert silhouette_k(rows, range(2, 8), 0, distance=distance, sample=60) == planted


def test_one_cluster_where_no_candidate_has_a_silhouette() -> None:
    assert silhouette_k(torch.ones(6, 2), [2, 3], 0) == 1
    with pytest.raises(InputError, match="at least one"):
        silhouette_k(torch.ones(6, 2), [], 0)


def test_overclustering_splits_the_planted_clusters_of_each_class() -> None:
    rows, planted = blobs(5, 30)
    y = (planted >= 3).long()
    plain = overcluster_per_class(rows, y, range(2, 6), 1, seed=0)
    fine = overcluster_per_class(rows, y, range(2, 6), 2, seed=0)
    assert plain.counts == (3, 2)
    assert fine.counts == (6, 4)
    assert all(len(planted[fine.ids == one].unique()) == 1 for one in range(10))
    with pytest.raises(InputError, match="factor"):
        overcluster_per_class(rows, y, range(2, 6), 0, seed=0)


def test_the_result_is_plain_tensors() -> None:
    found = kmeans(torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 2, -1)
    assert isinstance(found, Clustering)
    assert (found.assignment.dtype, found.centres.dtype) == (torch.int64, torch.float32)
