"""Colours and crops as mmsegmentation makes them."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from evmamba.tasks.segmentation.augment import PhotometricDistortion, TrainingAugmentation


def distorted(pixels: torch.Tensor, *steps: tuple[str, float]) -> torch.Tensor:
    found = PhotometricDistortion().transform(tv_tensors.Image(pixels), {"steps": list(steps)})
    assert found.dtype == torch.uint8
    return found.as_subclass(torch.Tensor)


def test_brightness_adds_and_contrast_multiplies_about_black():
    pixels = torch.tensor([0, 10, 100, 250], dtype=torch.uint8).expand(3, 1, 4)
    assert distorted(pixels, ("brightness", 20.6))[0, 0].tolist() == [20, 30, 120, 255]
    assert distorted(pixels, ("brightness", -20.5))[0, 0].tolist() == [0, 0, 79, 229]
    assert distorted(pixels, ("contrast", 1.5))[0, 0].tolist() == [0, 15, 150, 255]
    assert distorted(pixels, ("brightness", -20.0), ("contrast", 0.5))[0, 0].tolist() == [0, 0, 40, 115]


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.5])
def test_saturation_multiplies_that_of_hsv(factor: float):
    pixels = torch.randint(0, 256, (3, 6, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = torch.empty(3, 6, 7)
    for row in range(6):
        for column in range(7):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, row, column] / 255).tolist())
            changed = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
            expected[:, row, column] = 255 * torch.tensor(changed)
    assert (distorted(pixels, ("saturation", factor)) - expected).abs().max() < 1.01  # cut, not rounded


def test_every_step_is_drawn_half_the_time_and_contrast_comes_second_or_last():
    torch.manual_seed(0)
    drawn = [[name for name, _ in PhotometricDistortion().make_params([])["steps"]] for _ in range(1000)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert sum(name in steps for steps in drawn) == pytest.approx(500, abs=60)
    full = [steps for steps in drawn if len(steps) == 4]
    assert {tuple(steps) for steps in full} == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }


def test_a_crop_of_two_classes_is_looked_for_ten_times_at_most():
    """A narrow second class at the right border is found; where there is none the last crop is taken."""
    label = np.zeros((64, 400), dtype=np.uint8)
    label[:, -32:] = 1
    image = Image.fromarray(np.zeros((64, 400, 3), dtype=np.uint8))
    augment = TrainingAugmentation(64, scale=(1.0, 1.0), distort=False, flip=0.0)
    torch.manual_seed(0)
    both = [len(augment(image, label)[1].unique()) == 2 for _ in range(60)]
    chance = 31 / 337  # of a crop with 17 to 47 columns of the second class: a quarter to three quarters
    assert np.mean(both) == pytest.approx(1 - (1 - chance) ** 11, abs=0.17)
    assert np.mean(both) > 3 * chance
    assert augment(image, np.zeros_like(label))[1].unique().tolist() == [0]
