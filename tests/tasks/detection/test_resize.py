"""Sizes, boxes and padding against mmdetection's own transforms, and strips that nearly vanish."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from evmamba.tasks.detection.detectors import RULES, build_detector
from evmamba.tasks.detection.resize import PublishedResize, TorchvisionResize

NORMALISATION = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
Sizes = Callable[[str], dict[str, Any]]


def test_sizes_and_boxes_are_those_of_the_original(golden_sizes: Sizes) -> None:
    limits = {name: entries for name, entries in golden_sizes("sizes_detection").items() if name.startswith("resize")}
    assert limits
    for name, entries in limits.items():
        _, _, long, _, short = name.split(" ")
        transform = PublishedResize((int(short),), int(long), *NORMALISATION)
        for entry in entries:
            width, height = entry["size"]
            target = {"boxes": torch.tensor(entry["boxes"])}
            image, resized = transform.resize(torch.empty(3, height, width), target)
            assert list(image.shape[-2:]) == entry["new_size"][::-1]
            torch.testing.assert_close(resized["boxes"], torch.tensor(entry["new_boxes"]), rtol=0, atol=1e-4)


def test_batches_are_padded_to_multiples_of_32(golden_sizes: Sizes) -> None:
    transform = PublishedResize((800,), 1333, *NORMALISATION)
    for entry in golden_sizes("sizes_detection")["padding"]:
        batch = transform.batch_images([torch.ones(3, *size) for size in entry["heights_widths"]])
        assert list(batch.shape[-2:]) == entry["batch"]
        height, width = entry["heights_widths"][0]
        assert batch[0].sum() == 3 * height * width  # padding is 0, the mean
    assert golden_sizes("sizes_detection")["padding"]


@pytest.mark.parametrize("rules", RULES)
def test_strips_keep_their_boxes_and_masks_in_place(rules: str) -> None:
    transform = build_detector(
        "retinanet", "resnet10t", 3, rules=rules, channels=16, min_size=(64,), max_size=128
    ).transform
    masks = torch.zeros(1, 2, 512, dtype=torch.uint8)
    masks[:, :, 128:384] = 1
    target = {"boxes": torch.tensor([[128.0, 0, 384, 2]]), "masks": masks}
    image, resized = transform.resize(torch.rand(3, 2, 512), target)
    assert tuple(image.shape) == (3, 1, 128)
    assert resized["boxes"].tolist() == [[32, 0, 96, 1]]
    assert resized["masks"].nonzero()[:, 2].tolist() == list(range(32, 96))
    assert target["boxes"].tolist() == [[128, 0, 384, 2]]


def test_training_draws_its_short_side_and_evaluation_takes_the_last() -> None:
    for kind in (PublishedResize, TorchvisionResize):
        transform = kind((32, 48, 64), 640, *NORMALISATION)
        image = torch.rand(3, 64, 80)
        drawn = {min(transform.train().resize(image)[0].shape[-2:]) for _ in range(40)}
        assert drawn == {32, 48, 64}
        assert tuple(transform.eval().resize(image)[0].shape[-2:]) == (64, 80)
