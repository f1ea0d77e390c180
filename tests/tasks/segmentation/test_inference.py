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
)


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
