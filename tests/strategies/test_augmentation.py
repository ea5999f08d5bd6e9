"""Augmentation: what moves, what stays, and that no colour is altered."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from shiftproof.strategies import augment

KINDS: list[Literal["shift", "crop-flip"]] = ["shift", "crop-flip"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 200, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=generator(7))


def moved(picture: np.ndarray, down: int, right: int) -> np.ndarray:
    """By numpy: pad with the edge, and cut out."""
    height, width = picture.shape[1:]
    padded = np.pad(picture, ((0, 0), (9, 9), (9, 9)), mode="edge")
    return padded[:, 9 - down : 9 - down + height, 9 - right : 9 - right + width]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (20, 12)])
def test_a_shift_moves_by_whole_pixels_up_to_an_eighth_and_repeats_the_edges_bit_for_bit(height: int, width: int) -> None:
    x = pictures(height=height, width=width)
    shifted = augment(x, "shift", generator())
    assert shifted.is_contiguous()
    seen = set()
    for before, after in zip(x.numpy(), shifted.numpy(), strict=True):
        reach = [(d, r) for d in range(-(height // 8), height // 8 + 1) for r in range(-(width // 8), width // 8 + 1)]
        matches = [offset for offset in reach if np.array_equal(moved(before, *offset), after)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == len(reach)  # 200 draws meet all of them


def test_in_the_interior_a_shift_is_a_roll() -> None:
    x = pictures(50)
    for before, after in zip(x, augment(x, "shift", generator()), strict=True):
        inner = after[:, 2:-2, 2:-2]
        rolls = [before.roll((d, r), (1, 2))[:, 2:-2, 2:-2] for d in range(-2, 3) for r in range(-2, 3)]
        assert sum(torch.equal(inner, roll) for roll in rolls) == 1


def test_crops_stay_in_the_range_of_the_picture_and_half_of_them_are_mirrored() -> None:
    # Brightness rises from left to right: whether it still does says if a crop was mirrored.
    ramp = torch.linspace(0.2, 0.8, 16).expand(400, 3, 16, 16)
    cropped = augment(ramp, "crop-flip", generator())
    assert cropped.shape == ramp.shape
    assert float(cropped.min()) >= 0.2 - 1e-6
    assert float(cropped.max()) <= 0.8 + 1e-6
    mirrored = (cropped[:, 0, 0, -1] < cropped[:, 0, 0, 0]).float().mean()
    assert 0.4 < float(mirrored) < 0.6


def test_crops_cover_from_an_eighth_to_all_of_the_area() -> None:
    ramp = torch.linspace(0, 1, 64)
    x = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.expand(64, 64)]).expand(500, 3, 64, 64)
    cropped = augment(x, "crop-flip", generator())
    width = (cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]).abs()
    height = (cropped[:, 1, -1, 0] - cropped[:, 1, 0, 0]).abs()
    area = (width * height).double()
    assert 0.05 < float(area.min()) < 0.13
    assert 0.85 < float(area.max()) <= 1.001
    assert float(area.mean()) == pytest.approx(0.54, abs=0.05)  # uniform in [0.08, 1], but for crops cut at the edge


@pytest.mark.parametrize("kind", KINDS)
def test_colours_are_not_touched(kind: Literal["shift", "crop-flip"]) -> None:
    grey = torch.rand(64, 1, 16, 16, generator=generator(3))
    ink = torch.tensor([0.9, 0.3, 0.0]).view(1, 3, 1, 1)
    altered = augment(grey * ink, kind, generator())
    torch.testing.assert_close(altered, altered.sum(1, keepdim=True) / ink.sum() * ink, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_generator_gives_the_same_pictures_and_samples_differ(kind: Literal["shift", "crop-flip"]) -> None:
    x = pictures(1).expand(20, 3, 16, 16)
    once = augment(x, kind, generator(1))
    assert torch.equal(once, augment(x, kind, generator(1)))
    assert not torch.equal(once, augment(x, kind, generator(2)))
    assert len({tuple(picture.flatten().tolist()) for picture in once}) > 5


def test_none_gives_the_inputs_themselves() -> None:
    x = pictures(2)
    assert augment(x, "none", generator()) is x
