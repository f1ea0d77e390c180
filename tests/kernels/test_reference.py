"""The definition against the original implementation: scan orders, outputs, gradients."""

import pytest
import torch
import torch.nn.functional as F

from evmamba.kernels import reference
from evmamba.kernels.paths import scan_paths

INPUTS = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
SIZES = ["8x6", "7x6", "8x5", "7x5", "5x4", "3x2", "1x4", "1x1"]


def height_and_width(size: str) -> tuple[int, int]:
    H, W = map(int, size.split("x"))
    return H, W


@pytest.mark.parametrize("size", SIZES)
def test_atrous_groups_and_their_merge_move_the_same_data_as_the_original(golden, size):
    data = golden("op_scan_merge")
    H, W = height_and_width(size)
    paths = scan_paths(H, W, "es2d")

    tokens = reference.gather_tokens(data[f"{size}_x"].permute(0, 2, 3, 1), paths)
    merged = reference.merge_tokens(data[f"{size}_ys"].mT, paths, H, W)

    assert torch.equal(tokens.mT, data[f"{size}_scan"])
    assert torch.equal(merged.permute(0, 3, 1, 2).flatten(2), data[f"{size}_merge"])


@pytest.mark.parametrize("size", ["8x6", "5x4", "1x3"])
def test_full_map_directions_move_the_same_data_as_vmamba(golden, size):
    data = golden("op_cross_scan_vmamba")
    paths = scan_paths(*height_and_width(size), "ss2d")
    tokens = reference.gather_tokens(data[f"{size}_x"].permute(0, 2, 3, 1), paths)
    assert torch.equal(tokens.mT, data[f"{size}_scan"])


@pytest.mark.parametrize("size", SIZES)
def test_scan_equals_the_original_in_float64(golden_case, size):
    case = golden_case("es2d", size, torch.float64)
    y = reference.scan(*(case[name] for name in INPUTS), "es2d")
    torch.testing.assert_close(y, case["y_before_norm"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("pattern", "size"), [("es2d", "5x4"), ("es2d", "8x6"), ("ss2d", "8x6"), ("ss2d", "1x3")])
def test_gradients_equal_the_original_in_float64(golden_case, pattern, size):
    case = golden_case(pattern, size, torch.float64)
    inputs = [case[name].requires_grad_() for name in INPUTS]

    y = F.layer_norm(reference.scan(*inputs, pattern), (6,), case["out_norm_weight"], case["out_norm_bias"])
    gradients = torch.autograd.grad((y * case["loss_weight"]).sum(), inputs)

    torch.testing.assert_close(y, case["y"], rtol=0, atol=1e-10)
    for name, gradient in zip(INPUTS, gradients, strict=True):
        torch.testing.assert_close(
            gradient, case[f"grad_{name}"], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_half_maps_are_scanned_in_float32(make_inputs):
    inputs = make_inputs(1, 3, 4, 6, 4, 2, torch.bfloat16)
    widened = [tensor.float() for tensor in inputs]
    y = reference.scan(*inputs, "es2d")
    assert y.dtype == torch.float32
    assert torch.equal(y, reference.scan(*widened, "es2d"))


def test_unknown_pattern_is_named():
    with pytest.raises(ValueError, match="'zigzag'"):
        scan_paths(2, 2, "zigzag")
