"""`evmamba explain`: the pictures show what the network computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from evmamba import EfficientVMamba
from evmamba.blocks import ES2D
from evmamba.interpret import class_activation, receptive_field, step_maps
from evmamba.kernels import es2d_scan
from evmamba.launch import cli


@pytest.mark.parametrize(("step", "groups"), [(1, 1), (2, 4), (4, 16)])
@pytest.mark.parametrize("size", [(4, 8), (5, 7)])
def test_the_groups_share_every_pixel_out_once(step: int, groups: int, size: tuple[int, int]):
    paths = ES2D(8, step=step).token_order(*size)
    assert len(paths) == groups
    pixels = paths[paths >= 0]
    assert sorted(pixels.tolist()) == list(range(size[0] * size[1]))


def test_the_drawn_order_is_that_of_the_scan():
    """A state that never decays and adds up ones counts, at every pixel, the tokens scanned before it in its group."""
    height, width = 4, 6
    layer = ES2D(8)
    parameters = (
        torch.zeros(4, 1 + 2, 8),
        torch.zeros(4, 8, 1),
        torch.full((4, 8), 30.0),  # softplus(30) = 30
        torch.full((32, 1), -40.0),  # decay exp(-30 exp(-40)) = 1
        torch.zeros(32),
    )
    parameters[0][:, 1:] = 1 / 8  # B = C = mean of the channels = 1
    y = es2d_scan(torch.ones(1, height, width, 8), *parameters)[0, :, :, 0].flatten() / 30
    for path in layer.token_order(height, width):
        assert y[path.long()].tolist() == pytest.approx(range(1, len(path) + 1))


def test_step_sizes_are_those_of_the_definition():
    torch.manual_seed(0)
    layer = ES2D(8, state_dim=4)
    model = nn.Sequential(layer)
    tokens = torch.randn(1, 3, 5, 8)
    (found,) = step_maps(model, tokens)
    signal = layer.signal_and_gate(tokens)[0][0]
    wanted = torch.empty(3, 5)
    for k, (first_row, first_column) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        low = signal[first_row::2, first_column::2] @ layer.x_proj_weight[k, :1].T
        delta = F.softplus(low @ layer.dt_projs_weight[k].T + layer.dt_projs_bias[k]).mean(-1)
        wanted[first_row::2, first_column::2] = delta / delta.mean()
    torch.testing.assert_close(found.steps, wanted.detach())
    assert found.name == "0"


def test_the_field_of_a_convolution_is_its_kernel():
    convolution = nn.Conv2d(3, 2, 5, padding=2)
    nn.init.ones_(convolution.weight)
    field, areas = receptive_field(convolution, [torch.rand(1, 3, 21, 21)])
    assert torch.equal(field > 0, F.pad(torch.ones(5, 5), (8,) * 4) > 0)
    assert areas[0.99] == pytest.approx(25 / 441)
    assert areas[0.2] == pytest.approx(9 / 441)


def test_the_field_of_the_scan_is_the_whole_image():
    torch.manual_seed(0)
    model = EfficientVMamba((8, 16, 24, 32), (1, 1, 1, 1)).eval()
    field, areas = receptive_field(model.forward_features, [torch.randn(1, 3, 128, 128)])
    assert (field > 0).float().mean() > 0.95
    assert 0 < areas[0.2] < areas[0.5] < areas[0.99] <= 1


def test_activation_lies_where_the_class_is_seen():
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, 2:4, 5] = 1.0  # class 0 looks at red, class 1 at green

    def classify(features: torch.Tensor) -> torch.Tensor:
        return features.mean(dim=(2, 3)) @ torch.tensor([[4.0, 0.0], [0.0, 4.0], [0.0, 0.0]])

    activation, label, probability = class_activation(lambda x: x.clone(), classify, image, None)
    assert label == 0
    assert 0.5 < probability < 1
    assert torch.equal(activation.nonzero(), torch.tensor([[2, 5], [3, 5]]))
    other, label, _ = class_activation(lambda x: x.clone(), classify, image, 1)
    assert label == 1
    assert not other.any()


@pytest.mark.parametrize(
    ("backbone", "pictures"),
    [
        ("efficientvmamba_t", {"scan", "steps", "receptive_field", "activation"}),
        ("resnet18", {"receptive_field", "activation"}),
        ("swin_tiny_patch4_window7_224", {"receptive_field", "activation"}),
    ],
)
def test_every_picture_is_there(backbone: str, pictures: set[str], tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    output = tmp_path / "out"
    size = "224" if backbone.startswith("swin") else "64"
    arguments = ["explain", str(tmp_path / "noise.png"), "--backbone", backbone, "--output", str(output)]
    assert cli.main([*arguments, "--size", size]) == 0
    assert {path.stem for path in output.iterdir()} == pictures
    for path in output.iterdir():
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, f"{path.name} is blank"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain a.png", "name one network"),
        ("explain a.png --backbone resnet18 --checkpoint b.ckpt", "name one network"),
        ("explain a.png --backbone resnet18", "a.png: no such image"),
        ("explain a.png --backbone resnet18 --class ant", "unknown class 'ant'"),
        ("explain a.png --backbone resnet18 --class 1000", "the network has 1000 classes, counted from 0"),
        ("explain a.png --backbone deit_tiny_patch16_224", "no maps"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
