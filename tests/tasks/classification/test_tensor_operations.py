"""RandAugment's operations on tensors against timm's, and the original's, on Pillow's images."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_choices, rand_augment_ops

from evmamba.tasks.classification.randaugment import EXTRA
from evmamba.tasks.classification.tensor_operations import BLACK, QUICK, apply, apply_to_one, is_known, is_quick, resize

FILL = (124, 116, 104)
# Smallest, usual and largest arguments that a level gives, or a little beyond.
ARGUMENTS: dict[str, list[tuple[float, ...]]] = {
    "AutoContrast": [()],
    "Equalize": [()],
    "Invert": [()],
    "Rotate": [(27.0,), (-13.5,), (0.0,)],
    "Posterize": [(1,), (3,), (8,)],
    "Solarize": [(0,), (100,), (256,)],
    "SolarizeAdd": [(0,), (99,)],
    "Color": [(0.1,), (1.0,), (1.72,)],
    "Contrast": [(0.1,), (1.72,)],
    "Brightness": [(0.1,), (1.9,)],
    "Sharpness": [(0.1,), (1.9,)],
    "ShearX": [(0.27,), (-0.3,)],
    "ShearY": [(0.27,), (-0.3,)],
    "TranslateXRel": [(0.405,), (-0.33,)],
    "TranslateYRel": [(0.405,), (-0.33,)],
    "TranslateX": [(20.0,)],
    "TranslateY": [(-20.5,)],
    "Distort": [(19,), (20,), (32,)],
    "Zoom": [(0.36,), (0.2,)],
    "Blur": [(0.45,), (-0.5,)],
    "Skew": [(0.27,), (-0.28,)],
}


def pictures() -> torch.Tensor:
    """A ramp with noise, noise alone, and one colour: uint8 [3, 3, 64, 48]."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 48)[None, :, None] + np.linspace(0, 40, 64)[:, None, None]
    found = [ramp + rng.integers(0, 15, (64, 48, 3)), rng.integers(0, 256, (64, 48, 3)), np.full((64, 48, 3), 90)]
    return torch.from_numpy(np.stack(found).astype(np.uint8)).permute(0, 3, 1, 2)


def with_pillow(name: str, image: torch.Tensor, arguments: tuple[float, ...]) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if name in EXTRA:
        found = EXTRA[name][0](picture, *arguments)
    else:
        found = NAME_TO_OP[name](picture, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(found)).permute(2, 0, 1)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_operation_is_pillows_to_one_step(name: str) -> None:
    images = pictures()
    colour = BLACK if name in EXTRA else FILL
    for arguments in ARGUMENTS[name]:
        ours = apply(images, [[(name, arguments, colour)]] * 3)
        theirs = torch.stack([with_pillow(name, image, arguments) for image in images])
        difference = (ours.int() - theirs.int()).abs()
        assert difference.max() <= 1
        # Blur rounds three times in each direction, Pillow in fixed point; all others hardly ever differ.
        assert (difference > 0).float().mean() < (0.15 if name == "Blur" else 1e-4 if name in QUICK else 0.001)


def drawn(name: str) -> tuple[float, ...]:
    """An argument of timm's range and beyond it, whole pixels among them."""
    if name in ("Brightness", "Sharpness"):
        return (random.choice([random.uniform(0, 2), 0.0, 1.0]),)
    if name.startswith("Translate"):
        return (random.uniform(-1.2, 1.2) if "Rel" in name else random.choice([random.uniform(-80, 80), -7, 40]),)
    ranges = {"Shear": (-0.5, 0.5), "Posterize": (0, 8), "Solarize": (0, 256), "SolarizeAdd": (0, 132)}
    low, high = ranges.get(name.rstrip("XY"), (0, 0))
    if name == "Invert":
        return ()
    return (random.uniform(low, high) if isinstance(low, float) else random.randint(low, high),)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_quick_operations_are_pillows_to_the_bit_whatever_the_size(name: str) -> None:
    rng = np.random.default_rng(1)
    random.seed(1)
    changed = 0
    for size in [(64, 48), (33, 1), (1, 40), (2, 2), (3, 5), (50, 120), (224, 224)] * 6:
        image = torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1)
        arguments = drawn(name)
        black = name == "Posterize" and arguments == (0,)  # Pillow refuses it, and so does timm
        expected = image * 0 if black else with_pillow(name, image, arguments)
        for stored in (image, image.contiguous()):
            found = apply_to_one(name, stored, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
            assert torch.equal(found, expected), (size, arguments)
        changed += not torch.equal(expected, image)
    assert changed > 10


@pytest.mark.parametrize("size", [(224, 224), (300, 256)])
@pytest.mark.parametrize(
    ("name", "amounts"),
    [
        *((f"Translate{axis}Rel", (0.45, -0.45, 0.405, 0.25, 0.29)) for axis in "XY"),
        *((f"Translate{axis}", (100.0, -0.5, 28.999999999999996)) for axis in "XY"),
        *((f"Shear{axis}", (0.3, -0.3, 0.27)) for axis in "XY"),
    ],
)
def test_amounts_without_noise(name: str, amounts: tuple[float, ...], size: tuple[int, int]) -> None:
    """As of level 9, and of level 10, at which timm cuts: many sums are whole numbers but for their rounding."""
    image = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1)
    for amount in amounts:
        found = apply_to_one(name, image, amount, fillcolor=FILL)
        difference = (found.int() - with_pillow(name, image, (amount,)).int()).abs()
        assert difference.max() <= name.startswith("Shear")
        assert (difference > 0).float().mean() < 1e-4


def test_quick_operations_of_a_batch_keep_their_amounts_colours_and_rows_apart() -> None:
    images = pictures()
    operations = [
        [("ShearX", (0.3,), FILL)],
        [("TranslateXRel", (-0.4,), (1, 2, 3))],
        [("TranslateX", (9.5,), BLACK)],
    ]
    together = apply(images, operations)
    for k, ((name, arguments, colour),) in enumerate(operations):
        assert torch.equal(together[k], apply_to_one(name, images[k], *arguments, fillcolor=colour))


def test_what_grows_with_the_level_is_as_quick() -> None:
    assert is_quick("PosterizeIncreasing")
    assert is_quick("SharpnessIncreasing")
    assert not is_quick("Rotate")
    assert QUICK.issubset(ARGUMENTS)


def test_images_of_a_batch_keep_their_own_operations() -> None:
    images = pictures()
    operations = [
        [("Rotate", (10.0,), FILL), ("Invert", (), FILL)],
        [],
        [("Skew", (0.1,), BLACK), ("Solarize", (100,), FILL)],
    ]
    before = images.clone()
    together = apply(images, operations)
    assert torch.equal(images, before)
    for k, own in enumerate(operations):
        assert torch.equal(together[k], apply(images[k : k + 1], [own])[0])
    assert torch.equal(together[1], images[1])
    assert not torch.equal(together[0], images[0])


def test_all_that_randaugment_draws_from_is_known() -> None:
    for increasing in (False, True):
        names = [op.name for op in rand_augment_ops(transforms=rand_augment_choices("", increasing))]
        assert len(names) == 15
        assert all(map(is_known, [*names, *EXTRA]))
    assert not is_known("GaussianBlurRand")


def test_resizing_in_floats_as_a_gpu_does_it_is_that_in_whole_numbers_to_one_step() -> None:
    """Elsewhere than on a CPU PyTorch resizes floating-point numbers only."""
    images = pictures()

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")  # only its type is looked at

    found = resize(images.as_subclass(Elsewhere), 40, 40).as_subclass(torch.Tensor)
    difference = (found.int() - resize(images, 40, 40).int()).abs()
    assert found.dtype == torch.uint8
    assert difference.max() <= 1
