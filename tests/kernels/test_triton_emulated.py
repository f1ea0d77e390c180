"""The compiled kernels, executed on the CPU (tests/emulator) against the float64 definition.

What the interpreter cannot see runs here: the real specialisation, the compiler's code, tensor cores, inline assembly,
shared memory and barriers, reads outside of a tensor. A longer set: pytest -m slow_emulator tests/kernels.
"""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from evmamba.kernels import triton_batch_norm, triton_depthwise, triton_norm
from evmamba.kernels.tuning import Tuning

from ..emulator.host import emulated, on_device
from . import batch_norm_cases, depthwise_cases, scan_cases, squeeze_cases

# Gradients of x and of its projection are rounded to half types, or summed by tensor cores from rounded numbers.
ROUNDED = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SUMMED = 3e-6  # all others, and y


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(poisoned_memory):
    pass


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("triton")


def assert_small(errors, dtype):
    limits = {name: ROUNDED[dtype] if name in ("x", "x_proj_weight") else SUMMED for name in errors}
    assert {name: error for name, error in errors.items() if not error < limits[name]} == {}


def check(cache, size, pattern, dtype, *, steps="ordinary", capability=90, tuning=None):
    with emulated(cache, capability) as emulation:
        assert_small(scan_cases.errors(size, pattern, dtype, steps, on_device, tuning), dtype)
    return emulation


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
QUICK = [
    pytest.param((2, 7, 5, 96, 4, 3), "es2d", bf16, id="odd map, three channel blocks"),
    pytest.param((4, 20, 20, 96, 4, 3), "es2d", bf16, id="several tiles of tokens"),
    pytest.param((1, 8, 8, 96, 4, 3), "es2d", bf16, id="groups as long as a checkpoint"),
    pytest.param((2, 7, 5, 40, 4, 3), "es2d", f32, id="tf32x3, channels not a multiple of a warp"),
    pytest.param((1, 3, 5, 64, 5, 4), "ss2d", f16, id="every pixel four times"),
]
SLOW = [
    pytest.param((1, 1, 1, 8, 16, 1), "es2d", f16, id="one pixel"),
    pytest.param((1, 3, 3, 8, 2, 1), "es2d", bf16, id="fewer channels than lanes"),
    pytest.param((1, 3, 3, 8, 64, 4), "es2d", bf16, id="64 states, four warps"),
    pytest.param((1, 4, 4, 32, 16, 2), "es2d", bf16, id="16 states"),
    pytest.param((2, 8, 8, 96, 16, 3), "es2d", bf16, id="T's first stage, smaller"),
    pytest.param((2, 8, 8, 192, 16, 6), "es2d", bf16, id="T's second stage, smaller"),
    pytest.param((2, 5, 6, 24, 5, 3), "es2d", f32, id="odd number of states"),
    pytest.param((3, 9, 9, 128, 2, 20), "ss2d", f32, id="rank beyond the registers"),
    pytest.param((4, 20, 20, 64, 1, 2), "es2d", bf16, id="one state"),
    pytest.param((2, 7, 5, 40, 4, 3), "es2d", f16, id="float16"),
]


@pytest.mark.parametrize(("size", "pattern", "dtype"), QUICK)
def test_compiled_scan_equals_the_definition(cache, size, pattern, dtype):
    check(cache, size, pattern, dtype)


@pytest.mark.slow_emulator
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("size", "pattern", "dtype"), QUICK + SLOW)
def test_compiled_scan_equals_the_definition_on_every_architecture(cache, size, pattern, dtype, capability):
    check(cache, size, pattern, dtype, capability=capability)


@pytest.mark.slow_emulator
@pytest.mark.parametrize("steps", ["small", "large"])
@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=str)
def test_compiled_scan_equals_the_definition_at_any_step_size(cache, steps, dtype):
    check(cache, (1, 14, 14, 32, 16, 3), "es2d", dtype, steps=steps)


def test_older_tensor_cores_give_the_same(cache):
    check(cache, (2, 7, 5, 96, 4, 3), "es2d", bf16, capability=80)


@pytest.mark.parametrize(
    ("size", "pattern", "dtype"),
    [
        pytest.param((2, 14, 24, 96, 4, 3), "es2d", bf16, id="several images, groups and checkpoints"),
        pytest.param((2, 1, 79, 8, 2, 18), "reverse", f32, id="backwards", marks=pytest.mark.slow_emulator),
        pytest.param((1, 1, 80, 33, 32, 2), "forward", f32, id="32 states", marks=pytest.mark.slow_emulator),
    ],
)
def test_compiled_segments_equal_one_long_scan(cache, size, pattern, dtype):
    launches = check(cache, size, pattern, dtype, tuning=Tuning(shortest_segment=32)).launches  # three segments
    assert [launch.kernel for launch in launches].count("carry_kernel") == 3  # twice forward, once backward


def test_results_do_not_depend_on_the_order_of_warps(cache):
    size = (4, 20, 20, 96, 4, 3)
    inputs, dy = scan_cases.make_inputs(size, "es2d", bf16), scan_cases.gradient_seed(size)
    results = []
    for order in (None, 0, 1):
        with emulated(cache, order=order):
            results.append(scan_cases.run(inputs, "es2d", dy, on_device))
    for y, gradients in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(gradients[name], g) for name, g in results[0][1].items())


@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=str)
@pytest.mark.parametrize("shape", [(70, 40), (2, 3, 5, 96)], ids=str)
def test_compiled_norm_and_gate_equal_pytorch(cache, shape, dtype, monkeypatch):
    monkeypatch.setattr(
        triton_norm, "tuning_of", lambda device: Tuning(row_programs=2)
    )  # so that a program has several blocks of rows
    generator = torch.Generator().manual_seed(0)
    D = shape[-1]
    y = 3 + 2 * torch.randn(shape, generator=generator)
    z = torch.randn(*shape[:-1], 2 * D, generator=generator).to(dtype).chunk(2, dim=-1)[1]  # by stride
    weight, bias = torch.randn(2, D, generator=generator)
    dout = torch.randn(shape, generator=generator).to(dtype)
    exact = [t.double().requires_grad_() for t in (y, z, weight, bias)]
    expected = F.layer_norm(exact[0], (D,), exact[2], exact[3]) * F.silu(exact[1])
    expected.backward(dout.double())
    with emulated(cache, order=0):
        out = triton_norm.forward(on_device(y), on_device(z), weight, bias, 1e-5)
        again = on_device(torch.empty(shape, dtype=dtype))
        gradients = triton_norm.backward(on_device(dout), on_device(y), on_device(z), weight, bias, 1e-5, out=again)
    rounding = {f32: 1e-6, bf16: 2**-8, f16: 2**-11}[dtype]
    assert scan_cases.relative_error(out, expected.detach()) < rounding
    assert scan_cases.relative_error(again, expected.detach()) < rounding
    for gradient, e, limit in zip(gradients, exact, (1e-6, rounding, 1e-6, 1e-6), strict=True):
        assert scan_cases.relative_error(gradient, e.grad) < limit


@pytest.mark.parametrize(
    ("size", "dtype", "drop"),
    [
        pytest.param((2, 17, 16, 24), bf16, True, id="several programs a map"),
        pytest.param((1, 3, 3, 96), f16, False, id="float16", marks=pytest.mark.slow_emulator),
        pytest.param((1, 3, 3, 40), f32, False, id="float32", marks=pytest.mark.slow_emulator),
    ],
)
def test_compiled_tail_of_a_block_equals_pytorch(cache, size, dtype, drop):
    with emulated(cache, order=0):
        errors = squeeze_cases.errors(size, dtype, on_device, drop=drop)
    limits = {name: {f32: 3e-6, bf16: 2**-8, f16: 2**-11}[dtype] if name in ("u", "v") else 3e-6 for name in errors}
    assert {name: error for name, error in errors.items() if not error < limits[name]} == {}


@pytest.mark.parametrize(
    ("size", "dtype", "activation"),
    [
        pytest.param((1, 9, 8, 64), bf16, "silu", id="several blocks of pixels"),
        pytest.param((2, 3, 5, 24), f16, "gelu", id="float16", marks=pytest.mark.slow_emulator),
        pytest.param((2, 3, 5, 40), f32, "relu", id="float32", marks=pytest.mark.slow_emulator),
        pytest.param((1, 9, 8, 48), bf16, "none", id="no activation", marks=pytest.mark.slow_emulator),
    ],
)
def test_compiled_depthwise_convolution_equals_pytorch(cache, size, dtype, activation, monkeypatch):
    monkeypatch.setattr(
        triton_depthwise, "tuning_of", lambda device: Tuning(row_programs=2)
    )  # so that a program has several blocks of pixels
    with emulated(cache, order=0):
        errors = depthwise_cases.errors(size, dtype, activation, on_device)
    limits = {name: {f32: 1e-6, bf16: 2**-7, f16: 2**-10}[dtype] if name in ("out", "x") else 3e-6 for name in errors}
    assert {name: error for name, error in errors.items() if not error < limits[name]} == {}


@pytest.mark.parametrize(
    ("size", "dtype", "activation"),
    [
        pytest.param((2, 5, 7, 24), bf16, "relu", id="several programs"),
        pytest.param((1, 9, 8, 96), f16, "gelu", id="float16", marks=pytest.mark.slow_emulator),
        pytest.param((2, 3, 5, 40), f32, "relu", id="float32", marks=pytest.mark.slow_emulator),
    ],
)
def test_compiled_batch_norm_equals_pytorch(cache, size, dtype, activation, monkeypatch):
    monkeypatch.setattr(triton_batch_norm, "tuning_of", lambda device: Tuning(row_programs=3))
    with emulated(cache, order=0):
        errors = batch_norm_cases.errors(size, dtype, activation, on_device, gated=activation == "relu")
    rounding = {f32: 3e-6, bf16: 2**-8, f16: 2**-10}[dtype]
    limits = {name: rounding if name in batch_norm_cases.ROUNDED else 3e-6 for name in errors}
    assert {name: error for name, error in errors.items() if not error < limits[name]} == {}


def test_compiled_layer_norm_equals_pytorch(cache):
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(70, 40, generator=generator)
    weight, bias = torch.randn(2, 40, generator=generator)
    dout = torch.randn(70, 40, generator=generator).to(bf16)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(exact[0], (40,), exact[1], exact[2])
    expected.backward(dout.double())
    with emulated(cache, order=0):
        out = triton_norm.forward(on_device(x), None, weight, bias, 1e-5, bf16)
        dx, dz, *of_parameters = triton_norm.backward(on_device(dout), on_device(x), None, weight, bias, 1e-5)
    assert dz is None
    assert scan_cases.relative_error(out, expected.detach()) < 2**-8
    for gradient, e in zip((dx, *of_parameters), exact, strict=True):
        assert scan_cases.relative_error(gradient, e.grad) < 1e-6
