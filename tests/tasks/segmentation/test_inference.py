from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evmamba.errors import UserError
from evmamba.tasks.segmentation.inference import (
    MULTI_SCALE_RATIOS,
    InferenceConfig,
    predict_labels,
    predict_probabilities,
    sliding_windows,
    target_size,
)

from ..golden import per_image

Golden = Callable[[str], dict[str, Tensor]]


class Patches(nn.Module):
    """The stored network: one convolution over patches of 4 x 4 pixels."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = data["weight"], data["bias"]

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.conv2d(image, self.weight, self.bias, stride=4)


class Inputs:
    """Pictures of the stored case, normalised in float64: already resized, so that only what follows is compared."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data
        self.network = Patches(data)
        height, width = data["ori_shape"].tolist()
        self.size = (height, width)
        self.resized = self.normalised(data["resized"])

    def normalised(self, picture: Tensor) -> Tensor:
        return ((picture.double() - self.data["mean"]) / self.data["std"]).permute(2, 0, 1)[None]


def test_whole_inference_is_mmsegmentations_in_two_resizes(golden_heads: Golden):
    case = Inputs(golden_heads("inference"))
    classes = predict_labels(case.network, case.resized, case.size, InferenceConfig())
    assert torch.equal(classes[0], case.data["whole_classes"].long())
    # What stood in the input's size goes through softmax once, so scores are compared up to a constant per pixel.
    probabilities = predict_probabilities(case.network, case.resized, case.size, InferenceConfig())
    expected = case.data["whole_logits"].softmax(0)
    torch.testing.assert_close(probabilities[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("wide", [False, True])
def test_sliding_inference_is_mmsegmentations(golden_heads: Golden, wide: bool):
    case = Inputs(golden_heads("inference"))
    crop = int(case.data["crop_wide" if wide else "crop"])
    config = InferenceConfig(mode="slide", crop=crop, stride=int(case.data["stride"]))
    classes = predict_labels(case.network, case.resized, case.size, config)
    assert torch.equal(classes[0], case.data["slide_wide_classes" if wide else "slide_classes"].long())
    if not wide:
        probabilities = predict_probabilities(case.network, case.resized, case.size, config)
        # mmsegmentation rounds the windows' mean to float32 on the way.
        torch.testing.assert_close(probabilities[0], case.data["slide_logits"].softmax(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_multi_scale_with_flip_is_mmsegmentations(golden_heads: Golden, mode: str):
    """Each scale from its stored picture; the mean over scales is ours to take."""
    case = Inputs(golden_heads("inference"))
    window = {"crop": int(case.data["crop"]), "stride": int(case.data["stride"])}
    config = InferenceConfig(mode=mode, flip=True, **window)  # type: ignore[arg-type]
    pictures = [case.normalised(picture) for picture in per_image(case.data, "scaled")]
    total = sum(predict_probabilities(case.network, picture, case.size, config) for picture in pictures)
    assert isinstance(total, Tensor)
    mean = total[0] / len(pictures)
    assert torch.equal(mean.argmax(0), case.data["tta_classes" if mode == "whole" else "tta_slide_classes"].long())
    if mode == "whole":
        torch.testing.assert_close(mean, case.data["tta_probabilities"], rtol=0, atol=1e-10)


def test_sizes_are_mmsegmentations(golden_sizes: Callable[[str], dict[str, Any]]):
    sizes = golden_sizes("sizes_segmentation")
    compared = 0
    for name, pairs in sizes.items():
        kind, *values = name.split(" ")
        if kind == "long":
            config, scale = InferenceConfig(short_side=int(values[2]), long_side=int(values[0])), 1.0
        elif kind == "factor":
            config, scale = InferenceConfig(), float(values[0])
        else:
            continue
        for (width, height), (new_width, new_height) in pairs:
            assert target_size((height, width), config, scale) == (new_height, new_width)
            compared += 1
    for factor, _, pairs in sizes["random factor, limits, sizes"]:
        config = InferenceConfig(short_side=512, long_side=2048)
        for (width, height), (new_width, new_height) in pairs:
            assert target_size((height, width), config, factor) == (new_height, new_width)
            compared += 1
    assert compared


def test_pictures_are_resized_as_mmsegmentation_does_but_for_whole_grey_values(golden_heads: Golden):
    """Without antialiasing the resized picture is the stored one, made by OpenCV in whole numbers, to a grey value."""
    case = Inputs(golden_heads("inference"))
    seen = []

    class Spy(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image[0].permute(1, 2, 0))
            return image

    long, short = case.data["base_scale"].tolist()
    picture = case.data["image"].double().permute(2, 0, 1)[None]
    predict_labels(Spy(), picture, case.size, InferenceConfig(short_side=short, long_side=long, antialias=False))
    assert (seen[-1] - case.data["resized"].double()).abs().max() <= 1
    for ratio, scaled in zip(case.data["ratios"].tolist(), per_image(case.data, "scaled"), strict=True):
        if ratio < 1:  # reduced
            predict_labels(Spy(), picture, case.size, InferenceConfig(scales=(ratio,), antialias=False))
            assert (seen[-1] - scaled.double()).abs().max() <= 1


class Pixelwise(nn.Module):
    """Scores at stride 1 that depend on nothing but the pixel: every way to cover an image gives the same."""

    def forward(self, image: Tensor) -> Tensor:
        return image


@pytest.mark.parametrize("size", [(40, 70), (17, 90), (33, 33), (10, 12)])
def test_windows_cover_every_pixel_and_stay_inside(size: tuple[int, int]):
    covered = torch.zeros(size)
    for rows, columns in sliding_windows(*size, crop=32, stride=21):
        window = covered[rows, columns]
        assert window.shape == (min(32, size[0]), min(32, size[1]))
        window += 1
    assert covered.min() >= 1


def test_sliding_windows_equal_the_whole_image_for_a_pixelwise_model():
    image = torch.randn(1, 4, 50, 75)
    slide = InferenceConfig(mode="slide", crop=32, stride=21)
    torch.testing.assert_close(
        predict_probabilities(Pixelwise(), image, (50, 75), slide), image.softmax(1), atol=1e-6, rtol=0
    )


def test_flip_is_undone():
    image = torch.randn(1, 4, 20, 30)
    config = InferenceConfig(flip=True)
    torch.testing.assert_close(predict_probabilities(Pixelwise(), image, (20, 30), config), image.softmax(1))


def test_softmax_probabilities_are_averaged_not_scores():
    class Shaky(nn.Module):
        """Sure of class 0 on the original, less sure of class 1 on anything else."""

        def forward(self, image: Tensor) -> Tensor:
            first = 9.0 if image.shape[-1] == 16 else -1.0
            return torch.tensor([first, 0.0]).view(1, 2, 1, 1).expand(1, 2, *image.shape[-2:])

    config = InferenceConfig(scales=(1.0, 2.0, 0.5, 1.5))
    found = predict_probabilities(Shaky(), torch.zeros(1, 3, 16, 16), (16, 16), config)[0, 0, 0, 0]
    expected = (torch.tensor(9.0).sigmoid() + 3 * torch.tensor(-1.0).sigmoid()) / 4
    torch.testing.assert_close(found, expected)


def test_multi_scale_runs_twelve_passes_at_the_stated_sizes():
    seen = []

    class Spy(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(tuple(image.shape[-2:]))
            return image

    config = InferenceConfig(short_side=40, scales=MULTI_SCALE_RATIOS, flip=True)
    predict_labels(Spy(), torch.randn(1, 3, 60, 90), (60, 90), config)
    assert seen[::2] == seen[1::2] == [(20, 30), (30, 45), (40, 60), (50, 75), (60, 90), (70, 105)]


def test_scores_are_resized_to_the_labels_own_size():
    image = torch.randn(2, 3, 40, 56)
    assert predict_labels(Pixelwise(), image, (33, 47), InferenceConfig(short_side=20)).shape == (2, 33, 47)


def test_long_side_limits_the_resize():
    sizes = []
    model = nn.Identity()
    model.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    predict_labels(model, torch.randn(1, 3, 20, 200), (20, 200), InferenceConfig(short_side=40, long_side=100))
    assert sizes == [(10, 100)]


@pytest.mark.parametrize("options", [{"stride": 600}, {"stride": 0}, {"scales": ()}, {"scales": (1.0, -1.0)}])
def test_senseless_options_are_refused(options: dict):
    with pytest.raises(UserError, match="inference"):
        InferenceConfig(**options)
