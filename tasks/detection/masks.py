"""Masks in and out of their boxes, to a fraction of a pixel, as in mmdetection."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, size: int, threshold: float | None = 0.5) -> Tensor:
    """What the mask head should say of its boxes.

    Args:
        masks: [m, H, W] of 0 and 1, one image's objects.
        boxes: [n, 4], pixels; parts outside the image are cut off.
        objects: [n], the mask of every box.
        size: S, side of the answer.
        threshold: shares of a cell from which on it belongs to the object; None keeps the shares.

    Returns:
        [n, S, S] in the boxes' dtype.
    """
    height, width = masks.shape[-2:]
    clipped = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    rois = torch.cat([objects[:, None].to(boxes), clipped], dim=1)
    shares = roi_align(masks[:, None].to(boxes), rois, size, sampling_ratio=-1, aligned=True)[:, 0]
    return shares if threshold is None else (shares >= threshold).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Bring masks into their image: bilinear between the cells of the mask, sampled at the pixels' centres.

    Args:
        masks: [n, S, S], probabilities; the mask's edges are those of its box.
        boxes: [n, 4], x1 y1 x2 y2 in pixels of the image, not rounded.
        size: height and width of the image.

    Returns:
        [n, H, W]; 0 away from the boxes.
    """
    # Bilinear sampling on a grid along the axes is two products with matrices of weights. Mixed precision would round
    # the weights to 8 bits.
    with torch.autocast(masks.device.type, enabled=False):
        columns = _weights(boxes[:, 0], boxes[:, 2], size[1], masks)
        rows = _weights(boxes[:, 1], boxes[:, 3], size[0], masks)
        return rows @ masks @ columns.mT


def _weights(start: Tensor, end: Tensor, length: int, masks: Tensor) -> Tensor:
    """[n, length, S]: how much every cell of a mask from `start` to `end` counts at every pixel's centre."""
    cells = masks.shape[-1]
    centre = torch.arange(length, device=masks.device, dtype=masks.dtype) + 0.5
    # A box without extent is nowhere: inf and nan become weights of 0.
    place = (centre - start[:, None]) / (end - start)[:, None] * cells - 0.5
    distance = place[..., None] - torch.arange(cells, device=masks.device, dtype=masks.dtype)
    return (1 - distance.abs()).clamp(min=0).nan_to_num(0)
