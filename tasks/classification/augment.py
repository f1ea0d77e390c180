"""Training augmentation of classification: crop and flip on uint8 tensors, timm's policies, timm's random erasing."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose

from evmamba.errors import UserError
from evmamba.tasks.classification.randaugment import PREFIX, posterize_to_black, with_nineteen_operations
from evmamba.tasks.classification.tensor_operations import apply_to_one, is_quick, resize
from evmamba.tasks.data import stage
from evmamba.tasks.images import Region

# Width to height of a crop.
RATIO = (3 / 4, 4 / 3)
NORMALISE = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


class Patch(NamedTuple):
    """What random erasing writes into a normalised image: `noise` [3, h, w] float32 from (top, left) on."""

    top: int
    left: int
    noise: Tensor


class Erased(NamedTuple):
    """The patches of a batch: their noise is one tensor, as every tensor costs its loading process an open file.

    `places` are (image, top, left, height, width), `noise` float32 [sum of 3 height width] in their order.
    """

    places: list[tuple[int, int, int, int, int]]
    noise: Tensor


class Step(NamedTuple):
    """An operation of a policy as it was drawn: `change` takes and gives uint8 [3, H, W]."""

    name: str
    change: Callable[..., Tensor]
    arguments: tuple[float, ...]
    options: dict[str, Any]

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.change(pixels, *self.arguments, **self.options)


class Begun(NamedTuple):
    """A crop, uint8 [3, image_size, image_size], and what was drawn to be done with it."""

    pixels: Tensor
    steps: list[Step]
    patches: list[Patch]


class TrainingAugmentation:
    """A region of a picture, which it draws -> a crop of one size as whole numbers, and the patches to write when it is
    normalised.

    A loading process hands out a quarter of the bytes that way; :func:`normalise` makes the network's input of them,
    on the device.

    Args:
        image_size: side of the crop in pixels.
        min_scale, flip, color_jitter, auto_augment, random_erasing: see `ClassificationData`.

    Raises:
        UserError: timm refuses `auto_augment`.
    """

    def __init__(
        self,
        image_size: int,
        min_scale: float = 0.08,
        flip: float = 0.5,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
    ) -> None:
        self.image_size = image_size
        self.scale = (min_scale, 1.0)
        self.flip = flip
        self.policy = _policy(image_size, color_jitter, auto_augment)
        # Whether it is called with a list, and gives that with the steps that it draws; or else with pixels.
        self.draws_ahead = _draws_ahead(self.policy)
        self.erase = RandomErasing(random_erasing, mode="pixel", device="cpu")

    def __call__(self, region: Tensor) -> tuple[Tensor, list[Patch]]:
        """Augment.

        Args:
            region: uint8 [3, h, w], as `draw_region` chose it; fastest where a pixel's colours lie side by side.

        Returns:
            uint8 [3, image_size, image_size] and the patches.
        """
        (crop,) = self.finish([self.begin(region)])
        return crop

    def begin(self, region: Tensor) -> Begun:
        """Crop a region, and draw what is to be done with it; argument as of a call."""
        with stage("resize"):
            pixels = resize_region(region, self.image_size)
            if self.draw_flip():
                pixels = pixels.flip(-1)
        steps: list[Step] = []
        if self.policy.transforms:
            with stage("policy"):
                if self.draws_ahead:
                    steps = self.policy(steps)
                else:
                    pixels = self.policy(pixels)
        with stage("erase"):
            return Begun(pixels, steps, self.draw_patches())

    def finish(self, begun: Sequence[Begun]) -> list[tuple[Tensor, list[Patch]]]:
        """Do it, each operation to all crops that have it: 1.1 times as many images a second as one by one.

        Returns:
            For each what a call gives.
        """
        crops = [one.pixels for one in begun]
        for turn in range(max((len(one.steps) for one in begun), default=0)):
            drawn = [(one.steps[turn], k) for k, one in enumerate(begun) if turn < len(one.steps)]
            with stage("policy"):
                for step, k in sorted(drawn, key=lambda pair: pair[0].name):
                    crops[k] = step(crops[k])
        return [(pixels, one.patches) for pixels, one in zip(crops, begun, strict=True)]

    def draw_region(self, height: int, width: int) -> Region:
        """What of an image of this size becomes the crop: a pixel at least, where timm's rounding leaves none."""
        image = torch.empty(3, height, width, device="meta")
        top, left, tall, wide = RandomResizedCropAndInterpolation.get_params(image, self.scale, RATIO)
        tall, wide = max(tall, 1), max(wide, 1)
        return min(top, height - tall), min(left, width - wide), tall, wide

    def draw_flip(self) -> bool:
        """Whether the crop is mirrored."""
        return random.random() < self.flip

    def draw_patches(self) -> list[Patch]:
        """What is erased from the crop."""
        canvas = _Canvas(torch.Size((3, self.image_size, self.image_size)))
        self.erase(canvas)
        return canvas.patches


def resize_region(pixels: Tensor, side: int) -> Tensor:
    """uint8 [3, h, w] -> [3, side, side], bicubic with antialiasing.

    The colours of a pixel stay side by side in memory where they are, as Pillow has them too.
    """
    # A batch of one whose strides say so: PyTorch's fast kernel asks for them.
    return resize(pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2), side, side)[0]


class _Canvas:
    """Stands in for the normalised image while timm draws what to erase, and keeps it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.patches: list[Patch] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        self.patches.append(Patch(place[1].start, place[2].start, noise))


def gather(patches: Sequence[list[Patch]]) -> Erased:
    """Put together what is to be written into each image of a batch."""
    flat = [(image, patch) for image, written in enumerate(patches) for patch in written]
    places = [(image, patch.top, patch.left, *patch.noise.shape[1:]) for image, patch in flat]
    return Erased(places, torch.cat([torch.empty(0), *(patch.noise.flatten() for _, patch in flat)]))


def normalise(pixels: Tensor, erased: Erased) -> Tensor:
    """Make the network's input of a batch.

    Args:
        pixels: uint8 [B, 3, H, W].
        erased: what to write into the images afterwards.

    Returns:
        float32 [B, 3, H, W], contiguous: ImageNet's mean taken off the pixels in 0..1, divided by its deviation.
    """
    mean, std = (torch.tensor(NORMALISE[name], device=pixels.device)[:, None, None] for name in ("mean", "std"))
    images = pixels.contiguous().float().div_(255).sub_(mean).div_(std)
    noises = erased.noise.split([3 * height * width for *_, height, width in erased.places])
    for (image, top, left, height, width), noise in zip(erased.places, noises, strict=True):
        images[image, :, top : top + height, left : left + width] = noise.view(3, height, width)
    return images


def _policy(image_size: int, color_jitter: float, auto_augment: str | None) -> Compose:
    """timm's part between crop and tensor, on uint8 [3, H, W]: a policy, or jitter of colours, or nothing."""
    nineteen = auto_augment is not None and auto_augment.split("-")[0] == PREFIX
    if nineteen and "inc" in str(auto_augment):
        raise UserError(f"data.auto_augment={auto_augment}: {PREFIX} has no increasing levels; leave -inc out")
    try:
        _, policy, _ = create_transform(
            image_size,
            is_training=True,
            color_jitter=color_jitter or None,
            auto_augment=auto_augment.replace(PREFIX, "rand") if nineteen and auto_augment else auto_augment,
            interpolation="bicubic",
            separate=True,
            **NORMALISE,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"timm refuses the augmentation (auto_augment={auto_augment}): {error or 'invalid'}") from error
    policy = posterize_to_black(policy)
    return _on_tensors(with_nineteen_operations(policy) if nineteen else policy)


def _draws_ahead(policy: Compose) -> bool:
    """RandAugment draws before it does anything; other parts, which may come behind it, draw while they work."""
    return all(isinstance(part, RandAugment) for part in policy.transforms)


def _on_tensors(policy: Compose) -> Compose:
    """The same draws and pixels, by Pillow where that is the quickest. What it is made of can be pickled."""
    ahead = _draws_ahead(policy)
    for place, part in enumerate(policy.transforms):
        if not isinstance(part, RandAugment):
            policy.transforms[place] = partial(_with_pillow, part)
            continue
        for operation in part.ops:
            name, timms = operation.name, operation.aug_fn
            change = partial(apply_to_one, name) if is_quick(name) else partial(_with_pillow, timms)
            operation.aug_fn = partial(_put_down, name, change) if ahead else change
        part.ops = np.array(part.ops)  # NumPy, which chooses from them, would make one of a list each time
    return policy


def _put_down(
    name: str, change: Callable[..., Tensor], before: list[Step], *arguments: float, **options: Any
) -> list[Step]:
    return [*before, Step(name, change, arguments, options)]


def _with_pillow(change: Callable[..., Image.Image], pixels: Tensor, *arguments: float, **options: Any) -> Tensor:
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    changed = change(image, *arguments, **options)
    return pixels if changed is image else torch.from_numpy(np.array(changed)).permute(2, 0, 1)
