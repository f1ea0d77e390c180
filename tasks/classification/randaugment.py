"""RandAugment over the nineteen operations behind the published logs: timm's fifteen, and Distort, Zoom, Blur and Skew.

Source: `lib/dataset/augment_ops.py` of the original's training code (hunto/image_classification_sota), whose levels run
over 10 where the magnitude's noise takes them; timm cuts them at 10.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from timm.data.auto_augment import AugmentOp, RandAugment, posterize
from torchvision.transforms import Compose

PREFIX = "rand19"
TOP_LEVEL = 10.0


# Left, top, right and bottom.
Box = tuple[int, int, int, int]


def distort(image: Image.Image, amount: int) -> Image.Image:
    """Move the inner corners of a grid of `amount` // 10 tiles a side by `amount` pixels right and down.

    At magnitude 9 there is one tile, nothing inner, and the image stays as it is; from 10 on there are two.
    """
    mesh = distorted_tiles(image.size, amount)
    if len(mesh) == 1:
        return image  # Pillow would compute it pixel by pixel
    return image.transform(image.size, Image.Transform.MESH, mesh, resample=Image.Resampling.BICUBIC)


def distorted_tiles(size: tuple[int, int], amount: int) -> list[tuple[Box, tuple[int, ...]]]:
    """Where each tile is (left, top, right, bottom), and the corners of what it shows: x and y of the upper left, then
    counter-clockwise, as Pillow takes a quadrilateral. `size` is width and height."""
    tiles = amount // 10
    lengths = [side // tiles for side in size]
    x_edges, y_edges = ([k * length for k in range(tiles)] + [side] for length, side in zip(lengths, size, strict=True))

    def corner(column: int, row: int) -> tuple[int, int]:
        shift = amount if 0 < column < tiles and 0 < row < tiles else 0
        return x_edges[column] + shift, y_edges[row] + shift

    mesh = []
    for row in range(tiles):
        for column in range(tiles):
            box = (x_edges[column], y_edges[row], x_edges[column + 1], y_edges[row + 1])
            places = ((column, row), (column, row + 1), (column + 1, row + 1), (column + 1, row))
            mesh.append((box, tuple(value for place in places for value in corner(*place))))
    return mesh


def zoom(image: Image.Image, factor: float) -> Image.Image:
    """Scale by `factor` and cut out the middle; at factors below 1 black surrounds it."""
    scaled, box = zoomed(image.size, factor)
    return image.resize(scaled, Image.Resampling.BICUBIC).crop(box)


def zoomed(size: tuple[int, int], factor: float) -> tuple[tuple[int, int], Box]:
    """The scaled width and height, and what is cut out of that: left, top, right, bottom."""
    width, height = (max(round(side * factor), 1) for side in size)
    left, top, right, bottom = (
        math.floor(whole / 2 + sign * side / 2)
        for sign in (-1, 1)
        for whole, side in zip((width, height), size, strict=True)
    )
    return (width, height), (left, top, right, bottom)


def blur(image: Image.Image, radius: float) -> Image.Image:
    """Gaussian; the original draws a sign, which changed nothing in its time and which Pillow refuses now."""
    return image.filter(ImageFilter.GaussianBlur(abs(radius)))


def skew(image: Image.Image, amount: float) -> Image.Image:
    """Perspective: every corner is moved along its side by `amount` of the longer side."""
    size = image.size
    coefficients = skewed(size, amount)
    return image.transform(size, Image.Transform.PERSPECTIVE, coefficients, resample=Image.Resampling.BICUBIC)


def skewed(size: tuple[int, int], amount: float) -> list[float]:
    """Pillow's eight coefficients of that, for a width and height."""
    width, height = size
    shift = math.ceil(max(width, height) * amount)
    before = [(0, 0), (width, 0), (width, height), (0, height)]
    after = [(-shift, 0), (width, -shift), (width + shift, height), (0, height + shift)]
    rows = []
    for (x, y), (u, v) in zip(after, before, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    matrix, target = np.array(rows, dtype=np.float64), np.array(before, dtype=np.float64).reshape(8)
    return (np.linalg.pinv(matrix) @ target).tolist()


def _signed(value: float) -> float:
    return -value if random.random() > 0.5 else value


# Operation and, from level 0..10, its argument.
EXTRA: dict[str, tuple[Callable[..., Image.Image], Callable[[float], float]]] = {
    "Distort": (distort, lambda level: int(level / TOP_LEVEL * 10 + 10)),
    "Zoom": (zoom, lambda level: level / TOP_LEVEL * 0.4),
    "Blur": (blur, lambda level: _signed(level / TOP_LEVEL * 0.5)),
    "Skew": (skew, lambda level: _signed(level / TOP_LEVEL * 0.3)),
}


class ExtraOp(AugmentOp):
    """One of `EXTRA`, drawn and applied as timm's operations are."""

    def __init__(self, name: str, like: AugmentOp) -> None:
        super().__init__(like.name, like.prob, like.magnitude, like.hparams)
        self.name = name
        # Methods, not closures: loading processes that are not forked get the operation pickled.
        self.aug_fn, self.level_fn = self._apply, self._argument

    def _apply(self, image: Image.Image, value: float, **_: Any) -> Image.Image:
        return EXTRA[self.name][0](image, value)

    def _argument(self, magnitude: float, _: dict[str, Any]) -> tuple[float]:
        return (EXTRA[self.name][1](magnitude),)


def with_nineteen_operations(transform: Compose) -> Compose:
    """Let timm's RandAugment in a training transform draw from all nineteen, levels not cut at 10."""
    policy: Any = next(step for step in transform.transforms if isinstance(step, RandAugment))
    policy.ops = [*policy.ops, *(ExtraOp(name, policy.ops[0]) for name in EXTRA)]
    for operation in policy.ops:
        operation.magnitude_max = math.inf
    return transform


def posterize_to_black(transform: Compose) -> Compose:
    """Let the policies of a training transform posterize to no bits at all: timm draws that, Pillow 12 refuses it."""
    for step in transform.transforms:
        drawn = getattr(step, "ops", None) or [operation for pair in getattr(step, "policy", []) for operation in pair]
        for operation in drawn:
            if getattr(operation, "aug_fn", None) is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    return posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)
