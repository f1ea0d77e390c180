"""Which images were classified right."""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from evmamba.tasks.per_image import PerImage, expect


class Right(PerImage):
    """Arrays ``top1`` and ``top5``: bool [images]."""

    kinds: ClassVar[Mapping[str, str]] = {"top1": "b", "top5": "b"}

    @classmethod
    def of(cls, found: Mapping[str, tuple[bool, bool]]) -> Self:
        """From (top-1 right, top-5 right) by image."""
        images = sorted(found)
        table = np.array([found[image] for image in images], dtype=bool).reshape(-1, 2)
        return cls(images, {"top1": table[:, 0], "top5": table[:, 1]})

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def check(self) -> None:
        for name in self.kinds:
            expect(self.arrays[name].shape == (len(self.images),), f"array {name} is not one number an image")

    def metric(self, name: str, weights: np.ndarray) -> np.ndarray:
        return weights @ self.arrays[name] / weights.sum(1)

    def outcomes(self, name: str) -> np.ndarray:
        return self.arrays[name]
