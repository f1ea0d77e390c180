"""Normalising, resizing and padding of images with their boxes and masks, and predictions back into the image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from evmamba.tasks.detection.masks import paste_masks
from evmamba.tasks.images import size_within


class PublishedResize(GeneralizedRCNNTransform):
    """As mmdetection: sides are rounded (torchvision cuts them), boxes clipped, masks pasted to a fraction of a pixel.

    One difference stays: pixels are resized as floating-point numbers, not rounded to whole grey values afterwards.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image [3, H, W] and its target (boxes in its pixels, masks [n, H, W])."""
        height, width = image.shape[-2:]
        short = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        size = size_within((height, width), short, self.max_size)
        image = interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        if target is None:
            return image, None
        limits = target["boxes"].new_tensor([size[1], size[0]] * 2)
        boxes = target["boxes"] * _factors((height, width), size, target["boxes"])
        target = target | {"boxes": torch.minimum(boxes.clamp(min=0), limits)}
        if "masks" in target:
            target["masks"] = interpolate(target["masks"][:, None], size)[:, 0]
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: Sequence[tuple[int, int]],
        original_image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Bring boxes, and masks [n, 1, S, S] as [n, 1, H, W], into the images' own pixels."""
        if self.training:
            return result
        brought = []
        for found, size, own in zip(result, image_shapes, original_image_sizes, strict=True):
            boxes = found["boxes"] / _factors(own, size, found["boxes"])
            masks = {"masks": paste_masks(found["masks"][:, 0], boxes, own)[:, None]} if "masks" in found else {}
            brought.append(found | {"boxes": boxes} | masks)
        return brought


class TorchvisionResize(GeneralizedRCNNTransform):
    """torchvision's, also for strips whose short side would shrink to no pixel.

    They are stretched to that one pixel, boxes and masks with them; torchvision brings predictions back.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image [3, H, W] and its target (boxes in its pixels, masks [n, H, W])."""
        size = [int(side) for side in image.shape[-2:]]
        least = max(size) // self.max_size + 1  # more than max(size) / max_size: rounding must not end below a pixel
        if min(size) < least:
            stretched = [max(side, least) for side in size]
            image = interpolate(image[None], size=stretched, mode="bilinear", align_corners=False)[0]
            if target is not None:
                target = target | {"boxes": resize_boxes(target["boxes"], size, stretched)}
                if "masks" in target:
                    target["masks"] = interpolate(target["masks"][:, None], size=stretched)[:, 0]
        return super().resize(image, target)


def _factors(old: Sequence[int], new: Sequence[int], like: Tensor) -> Tensor:
    """What to multiply x1 y1 x2 y2 with, between sizes (height, width)."""
    return like.new_tensor([new[1] / old[1], new[0] / old[0]] * 2)
