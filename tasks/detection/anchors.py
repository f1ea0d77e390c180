"""Anchors as in mmdetection: not rounded, at fixed strides, and only those inside an image's own padding count.

torchvision's generator rounds the sides to whole pixels and divides the image's side by the map's, which on maps whose
side was rounded up (800 x 1344 at stride 128) sets anchors up to 84 pixels elsewhere.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

# Images are padded to multiples of it, right and bottom.
PADDING = 32


class AnchorGrid(AnchorGenerator):
    """Anchors centred at (column * stride, row * stride); in a cell the aspect ratio is the outer index.

    Args:
        sizes: per level the sides of a square anchor in pixels.
        aspect_ratios: height / width, the same at every level.
        strides: of the levels, in pixels.

    ``forward``: an image list and the maps [B, C, h, w] -> per image [N, 4] (x1 y1 x2 y2) in the maps' dtype, flattened
    by level, row, column, anchor; all images share one tensor.
    """

    def __init__(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], strides: Sequence[int]
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)
        # In float64, whatever the maps have: they are rounded once, when the grid is known.
        self.cell_anchors = [_cell(sides, aspect_ratios) for sides in sizes]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        like = feature_maps[0]
        sizes = [(level.shape[-2], level.shape[-1]) for level in feature_maps]
        return [torch.cat(self.level_anchors(sizes, like))] * len(image_list.image_sizes)

    def level_anchors(self, sizes: Sequence[tuple[int, int]], like: Tensor) -> list[Tensor]:
        """Anchors [n, 4] of every level, for maps of these sizes (height, width), in the dtype and on the device of
        `like`."""
        levels = []
        for (height, width), stride, cell in zip(sizes, self.strides, self.cell_anchors, strict=True):
            x, y = (stride * torch.arange(n, dtype=like.dtype, device=like.device) for n in (width, height))
            rows, columns = torch.meshgrid(y, x, indexing="ij")
            centres = torch.stack([columns, rows, columns, rows], dim=-1).reshape(-1, 1, 4)
            levels.append((centres + cell.to(like)).reshape(-1, 4))
        return levels

    def counting(self, image_sizes: Sequence[tuple[int, int]], maps: Sequence[Tensor]) -> list[Tensor | None]:
        """Which anchors take part in an image's losses: those that begin inside its own padded area.

        Args:
            image_sizes: height and width of every image in the batch, without padding.
            maps: the levels.

        Returns:
            Per image bool [N], or None where all count, as is usual.
        """
        return [self._counting((_padded(height), _padded(width)), maps) for height, width in image_sizes]

    def _counting(self, padded: tuple[int, int], maps: Sequence[Tensor]) -> Tensor | None:
        levels, everything = [], True
        for level, stride, per_cell in zip(maps, self.strides, self.num_anchors_per_location(), strict=True):
            height, width = level.shape[-2:]
            rows, columns = (min(math.ceil(side / stride), n) for side, n in zip(padded, (height, width), strict=True))
            everything = everything and (rows, columns) == (height, width)
            inside = torch.zeros(height, width, per_cell, dtype=torch.bool, device=level.device)
            inside[:rows, :columns] = True
            levels.append(inside.flatten())
        return None if everything else torch.cat(levels)


def _padded(side: int) -> int:
    return math.ceil(side / PADDING) * PADDING


def _cell(sides: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors [ratios * sides, 4] around the origin, float64."""
    root = torch.tensor(aspect_ratios, dtype=torch.float64).sqrt()[:, None]
    side = torch.tensor(sides, dtype=torch.float64)
    width, height = (side / root).flatten(), (side * root).flatten()
    return torch.stack([-width, -height, width, height], dim=1) / 2
