"""Training images decoded and augmented on the trainer's device (`ClassificationData.augment_on`).

Loading processes read the files, and draw what is to be done from the same numbers in the same order as where they do
it themselves: the same crops, flips, operations and erased rectangles, whatever device carries them out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evmamba.errors import UserError
from evmamba.tasks.classification.augment import Patch, TrainingAugmentation, resize_region
from evmamba.tasks.classification.folders import FolderImages
from evmamba.tasks.classification.randaugment import EXTRA
from evmamba.tasks.classification.shards import ShardImages
from evmamba.tasks.classification.tensor_operations import BLACK, Operation, apply, is_known
from evmamba.tasks.data import stage
from evmamba.tasks.images import Region, cut, decode_jpegs, turn_upright

# Whole images on the device at once; their crops are small.
AT_ONCE = 64


class Draws(NamedTuple):
    """What is to be done with an image: cut out `region`, mirror it, and the operations in their order."""

    region: Region
    mirrored: bool
    operations: list[Operation]


class Plan(NamedTuple):
    """What a batch tells of one image: its row among the training images, upright height and width, EXIF's orientation
    (None: not a JPEG but pixels, [height, width, 3] and upright), and the draws."""

    row: int
    height: int
    width: int
    orientation: int | None
    draws: Draws


class Encoded(NamedTuple):
    """The images of a batch before they are decoded: bytes one after the other (one tensor, as every tensor costs its
    loading process an open file), how many are whose, and what is to be done."""

    content: Tensor
    sizes: list[int]
    plans: list[Plan]


EncodedSample = tuple[Tensor, int, str, list[Patch], Plan]


class DrawnAugmentation(TrainingAugmentation):
    """`TrainingAugmentation` that can also say what it would do.

    Raises:
        UserError: the policy is none of RandAugment's, or has operations that are not done on tensors.
    """

    def __init__(self, *options: float | str | None) -> None:
        super().__init__(*options)  # type: ignore[arg-type]
        if not self.draws_ahead:
            raise UserError(
                "data.augment_on=device has RandAugment (auto_augment=rand-..., rand19-...) and no other policy, nor "
                "color_jitter; leave one of them out"
            )
        for name in (operation.name for part in self.policy.transforms for operation in part.ops):
            if not is_known(name):
                raise UserError(f"data.augment_on=device has no operation {name}; leave one of them out")

    def draw(self, height: int, width: int) -> tuple[Draws, list[Patch]]:
        """What is to be done with an image of this size, and the patches to write when it is normalised."""
        region, mirrored, steps = self.draw_region(height, width), self.draw_flip(), self.policy([])
        operations = [
            (name, arguments, BLACK if name in EXTRA else options["fillcolor"]) for name, _, arguments, options in steps
        ]
        return Draws(region, mirrored, operations), self.draw_patches()


class EncodedImages(Dataset[EncodedSample]):
    """(bytes, label, file name, patches, plan) for images of folders or shards."""

    def __init__(self, images: FolderImages | ShardImages, augment: DrawnAugmentation) -> None:
        self.images = images
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> EncodedSample:
        with stage("read"):
            jpeg = self.images.read_jpeg(index)
            if jpeg is None:  # the formats of which no device has a decoder
                pixels = self.images.read_pixels(index).permute(1, 2, 0)
                content, height, width, orientation = pixels.flatten(), *pixels.shape[:2], None
            else:
                content, height, width, orientation = jpeg
        with stage("draw"):
            draws, patches = self.augment.draw(height, width)
        plan = Plan(index, height, width, orientation, draws)
        return content, int(self.images.labels[index]), str(self.images.path(index)), patches, plan


def encoded(contents: Sequence[Tensor], plans: Sequence[Plan]) -> Encoded:
    """Put the images of a batch together."""
    return Encoded(torch.cat(list(contents)), [len(content) for content in contents], list(plans))


def decode_and_augment(batch: Encoded, images: FolderImages | ShardImages, side: int, device: torch.device) -> Tensor:
    """Carry out what was drawn.

    Args:
        batch: on the CPU.
        images: where those come from that the device's decoder refuses.
        side: of the crops.
        device: where it is done.

    Returns:
        uint8 [B, 3, side, side].

    Raises:
        UserError: an image that nothing can read, as of :func:`evmamba.tasks.images.read_image`.
    """
    crops = []
    for plan, pixels in zip(batch.plans, _decoded(batch, images, device), strict=True):
        crop = resize_region(cut(pixels, plan.draws.region), side)
        crops.append(crop.flip(-1) if plan.draws.mirrored else crop)
    return apply(torch.stack(crops), [plan.draws.operations for plan in batch.plans])


def _decoded(batch: Encoded, images: FolderImages | ShardImages, device: torch.device) -> Iterator[Tensor]:
    """The whole images, upright."""
    both = list(zip(batch.plans, batch.content.split(batch.sizes), strict=True))
    for start in range(0, len(both), AT_ONCE):
        part = both[start : start + AT_ONCE]
        jpegs = iter(decode_jpegs([content for plan, content in part if plan.orientation is not None], device))
        for plan, content in part:
            if plan.orientation is None:
                yield content.view(plan.height, plan.width, 3).to(device).permute(2, 0, 1)
            elif (stored := next(jpegs)) is None:
                yield images.read_pixels(plan.row).to(device)
            else:
                yield turn_upright(stored, plan.orientation)
