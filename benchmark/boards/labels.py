"""Where the names of points go, so that a plot with twenty of them can be read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ANGLES = np.deg2rad(np.arange(0.0, 360.0, 15.0))
RADII = (6.0, 10.0, 15.0, 21.0, 28.0, 36.0, 46.0, 58.0, 72.0)  # typographic points between a point and its label
SWEEPS = 4


def place_labels(points: Array, sizes: Array, obstacles: Array, frame: Array, unit: float = 1.0) -> Array:
    """Lower left corners of labels that avoid each other, the obstacles and the edge of the frame, each near its point.

    Greedy and deterministic: every label takes the cheapest of a ring of candidates in turn, and again once all others stand.

    Args:
        points: (N, 2) float64, what the labels belong to, in pixels.
        sizes: (N, 2) float64, width and height of the labels.
        obstacles: (M, 4) float64, boxes to keep clear: left, bottom, right, top.
        frame: (4,) float64, the box that holds everything.
        unit: Pixels of a typographic point.

    Returns:
        (N, 2) float64.
    """
    boxes = np.full((len(points), 4), np.nan)
    for _ in range(SWEEPS):
        for place, (point, size) in enumerate(zip(points, sizes, strict=True)):
            candidates, distances = _ring(point, size, unit)
            others = np.delete(boxes, place, 0)
            others = others[~np.isnan(others[:, 0])]
            outside = _area(candidates) - _overlap(candidates, frame[None]).sum(1)
            cost = 4 * _overlap(candidates, others).sum(1) + _overlap(candidates, obstacles).sum(1) + 8 * outside
            # A label that covers nothing but stands far off is worse than one that touches an error bar.
            cost = cost / float(size.prod()) + 0.01 * distances / unit
            boxes[place] = candidates[int(np.argmin(cost))]
    return boxes[:, :2]


def crosses(points: Array, low: Array, high: Array, unit: float) -> Array:
    """Boxes around points and their error bars, for labels to keep clear of.

    Args:
        points: (N, 2) float64, in pixels.
        low: (N, 2) float64, left and lower ends of the bars.
        high: (N, 2) float64, right and upper ends.
        unit: Pixels of a typographic point.

    Returns:
        (5 N, 4) float64: a marker matters more than a bar and is counted three times.
    """
    half = 3.5 * unit
    markers = np.concatenate([points - half, points + half], 1)
    across = np.stack([low[:, 0], points[:, 1] - unit, high[:, 0], points[:, 1] + unit], 1)
    upright = np.stack([points[:, 0] - unit, low[:, 1], points[:, 0] + unit, high[:, 1]], 1)
    return np.concatenate([markers] * 3 + [across, upright])


def spread(heights: Array, gap: float, low: float, high: float) -> Array:
    """Heights moved as little as keeps them `gap` apart, in their order, within [low, high] if there is room.

    Pool-adjacent-violators on heights less their place in the queue: the least-squares solution.

    >>> spread(np.array([1.0, 1.0, 5.0]), gap=1.0, low=0.0, high=10.0).tolist()
    [0.5, 1.5, 5.0]
    """
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    pools: list[list[float]] = []
    for height in heights[order] - steps:
        pools.append([float(height)])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    level = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    room = max(high - float(steps[-1]), low)
    moved = np.empty(len(heights))
    moved[order] = level.clip(low, room) + steps
    return moved


def _ring(point: Array, size: Array, unit: float) -> tuple[Array, Array]:
    """(C, 4) boxes around a point, and how far each is from it."""
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # (A, 2)
    radii = unit * np.repeat(RADII, len(ANGLES))  # (C,)
    around = np.tile(directions, (len(RADII), 1))
    # The box touches the circle with the side or corner that faces the point.
    center = point + around * radii[:, None] + np.sign(around.round(6)) * size / 2 * np.minimum(1.0, 2 * np.abs(around))
    return np.concatenate([center - size / 2, center + size / 2], 1), radii


def _overlap(boxes: Array, others: Array) -> Array:
    """(C, M) areas that two sets of boxes share."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared: Array = (high - low).clip(min=0.0).prod(2)
    return shared


def _area(boxes: Array) -> Array:
    area: Array = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return area
