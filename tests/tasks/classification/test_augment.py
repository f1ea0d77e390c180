"""Training's augmentation on uint8 tensors against timm's own on Pillow images and normalised tensors."""

import pickle
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from evmamba.errors import UserError
from evmamba.tasks.classification.augment import NORMALISE, Patch, TrainingAugmentation, gather, normalise
from evmamba.tasks.classification.randaugment import posterize_to_black, with_nineteen_operations
from evmamba.tasks.images import cut
from evmamba.tasks.training.randomness import seed_step


def photograph(height: int = 90, width: int = 120) -> torch.Tensor:
    """Smooth, with noise: uint8 [3, height, width], colours side by side as the decoder leaves them."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    pixels = (ramp + rng.integers(0, 15, (height, width, 3))).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_crop_and_flip_are_pillows_to_one_step():
    """Of the region that was drawn; Pillow's own bicubic rounds between its two passes."""
    augment = TrainingAugmentation(48, flip=1.0)
    pixels = photograph()
    random.seed(3)
    top, left, height, width = region = augment.draw_region(90, 120)
    ours, patches = augment(cut(pixels, region))
    assert patches == []
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
    pillows = image.resize((48, 48), Image.Resampling.BICUBIC).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = (ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillows)).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.05


def test_crops_are_torchvisions_to_the_bit():
    augment = TrainingAugmentation(48, flip=0.0)
    for seed in range(5):
        random.seed(seed)
        region = augment.draw_region(90, 120)
        ours, _ = augment(cut(photograph(), region))
        expected = resized_crop(photograph(), *region, [48, 48], InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(ours, expected)
        assert ours.permute(1, 2, 0).is_contiguous()


def test_the_crops_cover_the_areas_and_shapes_asked_for():
    augment = TrainingAugmentation(32, min_scale=0.25)
    parts = [augment.draw_region(90, 120) for _ in range(300)]
    areas = [height * width / (90 * 120) for _, _, height, width in parts]
    assert 0.24 < min(areas) < 0.32
    assert max(areas) > 0.85
    ratios = [width / height for _, _, height, width in parts]
    assert 0.7 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.4


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 3)])
def test_of_the_smallest_images_a_pixel_is_left(size):
    augment = TrainingAugmentation(32, min_scale=0.01)
    for seed in range(200):
        random.seed(seed)
        top, left, height, width = augment.draw_region(*size)
        assert 0 <= top < top + height <= size[0]
        assert 0 <= left < left + width <= size[1]


def test_half_of_the_crops_are_mirrored():
    augment, ramp = TrainingAugmentation(32), torch.arange(32, dtype=torch.uint8).expand(3, 32, 32)
    random.seed(0)
    rows = [augment(ramp)[0][0, 0] for _ in range(200)]
    mirrored = [bool(row[0] > row[-1]) for row in rows]
    assert 70 < sum(mirrored) < 130


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand19-m9-mstd0.5"])
def test_policies_change_the_image_and_are_seeded(policy: str):
    augment = TrainingAugmentation(32, auto_augment=policy, flip=0.0, min_scale=1.0)
    plain = TrainingAugmentation(32, flip=0.0, min_scale=1.0)

    def drawn(which: TrainingAugmentation, seed: int) -> torch.Tensor:
        seed_step(seed, 0, 0, 0)
        return which(photograph())[0]

    changed = [not torch.equal(drawn(augment, seed), drawn(plain, seed)) for seed in range(20)]
    assert sum(changed) > 10  # two operations, each with probability 0.5, some of which change nothing
    assert all(torch.equal(drawn(augment, seed), drawn(augment, seed)) for seed in range(5))


def test_jitter_of_colours_is_timms():
    augment = TrainingAugmentation(32, color_jitter=0.4)
    assert any(not torch.equal(augment(grey)[0], grey[:, :32, :32]) for grey in [photograph() * 0 + 100] * 3)


def test_normalised_pixels_are_those_of_timms_transform_to_the_bit():
    pixels = torch.stack([photograph(32, 32), photograph(32, 32).flip(2)])
    timms = create_transform(32, is_training=False, crop_pct=1.0, **NORMALISE)
    expected = torch.stack([timms(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in pixels])
    ours = normalise(pixels, gather([[], []]))
    assert ours.is_contiguous()
    assert torch.equal(ours, expected)


def test_erased_parts_are_those_that_timm_erases():
    augment = TrainingAugmentation(32, random_erasing=1.0, flip=0.0, min_scale=1.0)
    seed_step(0, 0, 0, 0)
    pixels, patches = augment(photograph(32, 32))
    assert patches
    seed_step(0, 0, 0, 0)
    augment.draw_flip()  # first, as in the whole
    expected = normalise(pixels[None], gather([[]]))
    RandomErasing(1.0, mode="pixel", device="cpu")(expected[0])
    assert torch.equal(normalise(pixels[None], gather([patches])), expected)


def test_patches_of_a_batch_are_one_tensor_and_reach_their_images():
    patches = [[], [Patch(1, 2, torch.full((3, 4, 5), 7.0))], [Patch(0, 0, torch.full((3, 1, 1), 8.0))] * 2]
    erased = gather(patches)
    assert erased.noise.shape == (3 * (4 * 5 + 1 + 1),)
    images = normalise(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), erased)
    plain = normalise(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), gather([[], [], []]))
    assert torch.equal(images[0], plain[0])
    assert (images[1, :, 1:5, 2:7] == 7).all()
    assert (images[2, :, 0, 0] == 8).all()
    assert (images != plain).sum() == 3 * (4 * 5 + 1)


@pytest.mark.parametrize("policy", ["nonsense-m9", "rand19-m9-inc1"])
def test_policies_that_do_not_exist_are_refused(policy: str):
    with pytest.raises(UserError, match=policy):
        TrainingAugmentation(32, auto_augment=policy)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand19-m1", "original-mstd0.5", "augmix-m10"])
def test_posterizing_to_no_bits_is_black(policy: str):
    (part,) = TrainingAugmentation(8, auto_augment=policy).policy.transforms
    pixels = torch.full((3, 8, 8), 200, dtype=torch.uint8)

    def posterized(operation: Any, bits: int) -> int:
        if isinstance(part, partial):  # a policy that is Pillow's as a whole
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            return np.array(operation.aug_fn(image, bits, **operation.kwargs)).max()
        (step,) = operation.aug_fn([], bits, **operation.kwargs)
        return int(step(pixels).max())

    timms = part.args[0] if isinstance(part, partial) else part
    operations = timms.ops if hasattr(timms, "ops") else [one for pair in timms.policy for one in pair]
    drawn = [one for one in operations if "Posterize" in one.name]
    assert drawn
    assert [posterized(one, 0) for one in drawn] == [0] * len(drawn)
    assert [posterized(one, 2) for one in drawn] == [192] * len(drawn)


@pytest.mark.parametrize(
    ("policy", "jitter"),
    [
        *((policy, 0.0) for policy in ("rand-m9-mstd0.5-inc1", "rand19-m9-mstd0.5", "rand-m15-n3-mstd1")),
        *((policy, 0.0) for policy in ("original-mstd0.5", "augmix-m5-w2")),
        ("rand-m9-t3a", 0.4),  # RandAugment, and behind it a part that draws while it works
        ("3a", 0.4),
    ],
)
def test_pixels_and_draws_of_a_policy_are_those_of_timm_with_pillow(policy: str, jitter: float):
    """Operations done on tensors, on Pillow's images between them, and whole policies that are Pillow's."""
    ours = TrainingAugmentation(48, auto_augment=policy, color_jitter=jitter, flip=0.0)
    _, timms, _ = create_transform(
        48,
        is_training=True,
        auto_augment=policy.replace("rand19", "rand"),
        color_jitter=jitter or None,
        interpolation="bicubic",
        separate=True,
        **NORMALISE,
    )
    timms = posterize_to_black(timms)
    if policy.startswith("rand19"):
        timms = with_nineteen_operations(timms)
    pixels, changed = photograph(48, 48), 0
    for seed in range(120):
        seed_step(seed, 0, 0, 0)
        found, after = ours(pixels)[0], (random.random(), np.random.rand())
        seed_step(seed, 0, 0, 0)
        ours.draw_flip()
        expected = torch.from_numpy(np.array(timms(Image.fromarray(pixels.permute(1, 2, 0).numpy())))).permute(2, 0, 1)
        ours.draw_patches()
        assert torch.equal(found, expected), seed
        assert after == (random.random(), np.random.rand())
        changed += not torch.equal(found, pixels)
    assert changed > 60


@pytest.mark.parametrize("policy", ["rand19-m9-mstd0.5", "rand-m9-n4-inc1", "original", None])
def test_regions_finished_together_are_those_finished_alone(policy: str | None):
    augment = TrainingAugmentation(40, auto_augment=policy, random_erasing=0.5)

    def begun() -> list[Any]:
        found = []
        for seed in range(12):
            seed_step(seed, 0, 0, 0)
            found.append(augment.begin(photograph(50 + seed, 60)))
        return found

    alone = [augment.finish([one])[0] for one in begun()]
    several = begun()
    assert {one.pixels.untyped_storage().nbytes() for one in several} == {3 * 40 * 40}  # no image is kept
    state = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[2]
    together = augment.finish(several)
    assert state == (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[2])
    for (pixels, patches), (expected, erased) in zip(together, alone, strict=True):
        assert torch.equal(pixels, expected)
        assert [patch[:2] for patch in patches] == [patch[:2] for patch in erased]
        assert all(torch.equal(one.noise, other.noise) for one, other in zip(patches, erased, strict=True))
    assert augment.finish([]) == []


def test_policies_reach_loading_processes_that_are_not_forked():
    for policy in ("rand19-m9-mstd0.5", "original"):
        augment = pickle.loads(pickle.dumps(TrainingAugmentation(32, auto_augment=policy)))
        assert augment(photograph())[0].shape == (3, 32, 32)
