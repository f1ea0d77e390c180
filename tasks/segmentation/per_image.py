"""Intersections and unions of every image."""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
from torch import Tensor

from evmamba.tasks.per_image import PerImage, expect
from evmamba.tasks.segmentation.metrics import confusion_matrix

# Pixels by class, [2, C]: intersection, union.
Overlap = np.ndarray


def overlap(prediction: Tensor, label: Tensor, num_classes: int) -> Overlap:
    """Count an image's pixels; arguments as of `SegmentationMetrics.update`."""
    confusion = confusion_matrix(prediction, label, num_classes).cpu().numpy()
    hit = confusion.diagonal()
    return np.stack([hit, confusion.sum(0) + confusion.sum(1) - hit])


class Overlaps(PerImage):
    """Arrays ``mIoU`` and, where the test had several scales, ``mIoU_ms``: int64 [images, 2, C], see `overlap`."""

    kinds: ClassVar[Mapping[str, str]] = {"mIoU": "i", "mIoU_ms": "i"}

    @classmethod
    def of(cls, found: Mapping[str, Mapping[str, Overlap]]) -> Self:
        """From metric -> overlap by image."""
        images = sorted(found)
        names = found[images[0]] if images else ()
        return cls(images, {name: np.stack([found[image][name] for image in images]) for name in names})

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def check(self) -> None:
        for name, array in self.arrays.items():
            expect(
                array.ndim == 3 and array.shape[:2] == (len(self.images), 2), f"array {name} has shape {array.shape}"
            )
            expect(
                bool((array >= 0).all() and (array[:, 0] <= array[:, 1]).all()),
                f"array {name} has intersections beyond unions",
            )

    def metric(self, name: str, weights: np.ndarray) -> np.ndarray:
        counts = self.arrays[name].astype(np.float64)
        intersection, union = weights @ counts[:, 0], weights @ counts[:, 1]
        occurs = union > 0
        iou = np.divide(intersection, union, out=np.zeros_like(union), where=occurs)
        with np.errstate(invalid="ignore"):  # no class at all: NaN
            return iou.sum(1) / occurs.sum(1)
