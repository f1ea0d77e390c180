"""mIoU from the overlaps of single images is that of the whole test."""

import numpy as np
import pytest
import torch

from evmamba.tasks.segmentation.metrics import IGNORE_INDEX, SegmentationMetrics
from evmamba.tasks.segmentation.per_image import Overlaps, overlap

CLASSES = 5


def images(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        label = torch.randint(0, CLASSES - 1, (7, 9), generator=generator)
        label[0, :2] = IGNORE_INDEX
        noise = torch.randint(0, CLASSES - 1, (7, 9), generator=generator)
        made.append((torch.where(torch.rand((7, 9), generator=generator) < 0.6, label % CLASSES, noise), label))
    return made


def test_samples_give_the_metric_of_the_images_that_are_in_them():
    pairs = images(6)
    kept = Overlaps.of({f"{i}.jpg": {"mIoU": overlap(p, label, CLASSES)} for i, (p, label) in enumerate(pairs)})
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 3, 0, 2, 1, 0]], dtype=float)
    for sample, found in zip(weights, kept.metric("mIoU", weights), strict=True):
        whole = SegmentationMetrics(CLASSES)
        for (prediction, label), times in zip(pairs, sample, strict=True):
            for _ in range(int(times)):
                whole.update(prediction, label)
        assert found == pytest.approx(float(whole.compute()["mIoU"]), abs=1e-15)
    assert kept.metrics == ("mIoU",)


def test_intersections_beyond_unions_are_refused():
    with pytest.raises(ValueError, match="beyond unions"):
        Overlaps(["a"], {"mIoU": np.array([[[3, 0], [2, 0]]])})
