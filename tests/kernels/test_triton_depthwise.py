"""The fused depthwise convolution against PyTorch in float64.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import pytest
import torch

from .triton_runs import DEVICE, INTERPRETED, MARKS, on_test_device

pytestmark = MARKS
# The interpreter truncates to bfloat16 where hardware rounds, weights too: it is left to GPUs and to the emulator.
ROUNDED = {torch.float32: 1e-6, torch.float16: 2**-10} | ({} if INTERPRETED else {torch.bfloat16: 2**-7})


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(poisoned_memory, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")


def check(size, dtype, activation, **options):
    from .depthwise_cases import errors

    found = errors(size, dtype, activation, on_test_device, **options)
    limits = {name: ROUNDED[dtype] if name in ("out", "x") else 3e-6 for name in found}
    assert {name: error for name, error in found.items() if not error < limits[name]} == {}


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
def test_convolution_equals_pytorch(activation, dtype):
    check((2, 3, 5, 12), dtype, activation)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param((1, 1, 1, 8), id="one pixel"),
        pytest.param((1, 7, 1, 8), id="one column"),
        pytest.param((1, 2, 3, 96), id="three blocks of channels"),
        pytest.param((1, 2, 3, 40), id="channels not a multiple of a block"),
        pytest.param((2, 9, 8, 8), id="several programs"),
    ],
)
def test_any_size(size):
    check(size, torch.float32, "silu", with_bias=False)


def test_programs_of_the_backward_walk_over_several_tiles(monkeypatch):
    from evmamba.kernels import triton_depthwise
    from evmamba.kernels.tuning import Tuning

    monkeypatch.setattr(triton_depthwise, "tuning_of", lambda device: Tuning(row_programs=2))
    check((3, 9, 8, 8), torch.float32, "silu")


def test_operators_follow_the_library_rules():
    from evmamba.kernels.depthwise import fused_depthwise_conv

    torch.use_deterministic_algorithms(False)  # opcheck compares two runs and takes NaN for a difference
    shapes = ((1, 2, 3, 8), (8, 1, 3, 3), (8,))
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    torch.library.opcheck(fused_depthwise_conv, (*inputs, "silu"))
    torch.library.opcheck(fused_depthwise_conv, (*inputs[:2], None, "none"))


def test_empty_batch():
    from evmamba.kernels import depthwise_conv

    shapes = ((0, 2, 3, 8), (8, 1, 3, 3), (8,))
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    out = depthwise_conv(*inputs, "silu")
    assert out.shape == shapes[0]
    out.sum().backward()
    assert all((t.grad == 0).all() for t in inputs)
