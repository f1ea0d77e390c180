"""The operations that timm's RandAugment lacks, and the policy over all nineteen."""

import pickle
import random

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from evmamba.tasks.classification.randaugment import (
    EXTRA,
    blur,
    distort,
    distorted_tiles,
    skew,
    with_nineteen_operations,
    zoom,
)


def noise(width: int = 48, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8))


def test_distortion_moves_the_inner_corner_from_two_tiles_on() -> None:
    image = noise()
    assert np.array_equal(distort(image, 19), image)
    by_pillow = image.transform(
        image.size, Image.Transform.MESH, distorted_tiles(image.size, 19), resample=Image.Resampling.BICUBIC
    )
    assert np.array_equal(by_pillow, image)
    distorted = np.asarray(distort(image, 20)).astype(int)
    assert (distorted != np.asarray(image)).mean() > 0.5
    # The upper left tile's own corner stays where it was; its inner one shows what was 20 pixels to the lower right.
    assert np.abs(distorted[0, 0] - np.asarray(image)[0, 0].astype(int)).max() < 10
    smooth = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy())
    assert np.asarray(distort(smooth, 20))[99, 99, 0] == pytest.approx(99 + 20, abs=3)


def test_zoom_shrinks_the_image_into_its_middle_on_black() -> None:
    found = np.asarray(zoom(Image.new("RGB", (50, 40), (200, 200, 200)), 0.36))
    rows, columns = (found[..., 0] > 0).any(1).nonzero()[0], (found[..., 0] > 0).any(0).nonzero()[0]
    assert (len(rows), len(columns)) == (14, 18)
    assert abs(rows.mean() - 19.5) <= 1
    assert abs(columns.mean() - 24.5) <= 1


def test_blur_has_no_sign() -> None:
    assert np.array_equal(blur(noise(), -0.45), blur(noise(), 0.45))
    assert np.asarray(blur(noise(), 0.45)).std() < np.asarray(noise()).std()


def test_skew_is_the_perspective_that_moves_every_corner_along_its_side() -> None:
    """What lay at (0, 0) is at (-shift, 0) afterwards: the image's upper left shows a place inside."""
    gradient = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    image = Image.fromarray(np.ascontiguousarray(gradient))
    found = np.asarray(skew(image, 0.1)).astype(int)
    assert found[0, 0, 0] == pytest.approx(200 * 20 / 220, abs=4)
    same = np.asarray(skew(image, 0.0)).astype(int)
    assert np.abs(same - np.asarray(image))[1:-1, 1:-1].max() <= 1


def test_the_policy_draws_from_nineteen_operations_without_cutting_levels() -> None:
    transform = with_nineteen_operations(create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5"))
    policy = next(step for step in transform.transforms if hasattr(step, "ops"))
    names = [operation.name for operation in policy.ops]
    assert len(names) == len(set(names)) == 19
    assert set(EXTRA) < set(names)
    assert {operation.prob for operation in policy.ops} == {0.5}
    transform = pickle.loads(pickle.dumps(transform))  # as for loading processes that are not forked
    random.seed(0)
    np.random.seed(0)
    for _ in range(60):
        assert tuple(transform(noise()).shape) == (3, 32, 32)
    operation = next(operation for operation in policy.ops if operation.name == "Distort")
    operation.magnitude, operation.prob, operation.magnitude_std = 12, 1.0, 0
    assert np.array_equal(operation(noise()), distort(noise(), 22))  # not cut at 10, where it is 20
