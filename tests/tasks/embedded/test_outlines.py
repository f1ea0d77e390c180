"""Outlines of drawn things give back their pixels."""

import numpy as np
from pycocotools import mask as coco_mask

from evmamba.tasks.embedded.outlines import annotation, polygons


def _ring() -> np.ndarray:
    mask = np.zeros((9, 11), dtype=bool)
    mask[1:8, 1:10] = True
    mask[3:6, 4:6] = mask[4, 7] = False
    return mask


def _masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    corner = np.zeros((4, 4), dtype=bool)
    corner[1, 1] = corner[2, 2] = True
    noise = [rng.random((int(h), int(w))) < p for p in (0.3, 0.6, 0.85) for h, w in rng.integers(2, 24, (10, 2))]
    return [_ring(), ~_ring(), corner, np.ones((3, 5), dtype=bool), *(mask for mask in noise if mask.any())]


def test_polygons_and_run_lengths_give_back_every_pixel() -> None:
    for mask in _masks():
        height, width = mask.shape
        outlines = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons(mask), height, width)))
        np.testing.assert_array_equal(outlines, mask)
        runs = annotation(mask, crowd=True)["segmentation"]
        np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(runs, height, width)), mask)
