"""What Triton would compile for a launch: no size of a batch or a map may ask for a kernel of its own.

Launches run on tensors without memory, up to the key under which Triton's JIT keeps a compiled kernel.
"""

import os
import random
from collections import defaultdict

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from evmamba.kernels import (  # noqa: E402
    triton_batch_norm,
    triton_depthwise,
    triton_es2d,
    triton_norm,
    triton_squeeze,
)

LARGEST_GRID = (2**31 - 1, 65535, 65535)


@pytest.fixture
def keys(monkeypatch):
    """Kernel -> the keys of all binaries that its launches asked for. A grid that no GPU takes is an error."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders, found = {}, defaultdict(set)

    def run(self, *args, grid, warmup, **options):
        if self not in binders:
            binders[self] = create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, options = binders[self](*args, **options)
        found[self.__name__].add(str((specialisation, options)))
        assert all(1 <= size <= largest for size, largest in zip(grid, LARGEST_GRID, strict=False)), (self, grid)

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def map_and_parameters(B, H, W, D=96, N=16, R=3):
    shapes = ((B, H, W, D), (4, R + 2 * N, D), (4, D, R), (4, D), (4 * D, N), (4 * D,))
    types = (torch.bfloat16, *[torch.float32] * 5)
    return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, types, strict=True)]


def tail_and_convolution(x):
    C = x.shape[-1]
    normal, w1, w2, b1, weight = (
        torch.empty(shape, device="meta") for shape in ((C,), (C // 8, C), (C, C // 8), (C // 8,), (C, 1, 3, 3))
    )
    out, mean, gates = triton_squeeze.forward(x, x, x, normal, normal, w1, b1, w2, normal, None, 1e-5)
    triton_squeeze.gate_gradients(out, x, x)
    triton_squeeze.branch_gradients(out, x, x, gates, mean, 1e-5)
    triton_depthwise.backward(triton_depthwise.forward(x, weight, normal, "silu"), x, weight, normal, "silu")


def batch_norm(x):
    normal, of_image = (torch.empty(shape, device="meta") for shape in (x.shape[-1:], (x.shape[0], x.shape[-1])))
    stats = triton_batch_norm.statistics(x, normal, normal, 0.1, 1e-5)
    norm = (x, stats, normal, normal)
    triton_batch_norm.pool(*norm, x, "relu")
    triton_batch_norm.forward(*norm, of_image, "relu")
    triton_batch_norm.backward(x, *norm, of_image, of_image, "relu", x)


def test_a_thousand_sizes_of_a_multi_scale_training_compile_each_kernel_once(keys):
    draw = random.Random(0)
    sizes = [(1, 1, 1), (1, 1, 5), (1, 16, 16), (16, 56, 56), (128, 56, 56)]
    sizes += [(draw.choice((1, 2, 4, 16)), draw.randint(100, 220), draw.randint(100, 340)) for _ in range(1000)]
    for i, size in enumerate(sizes):
        inputs = map_and_parameters(*size)
        y, states = triton_es2d.forward(*inputs, "es2d", save=True)
        triton_es2d.backward(y, *inputs, states, "es2d")
        weight = inputs[5][:96]
        out = triton_norm.forward(y, inputs[0], weight, weight, 1e-5)
        triton_norm.backward(out, y, inputs[0], weight, weight, 1e-5)
        if i < 5 or i % 20 == 0:
            tail_and_convolution(inputs[0])
            batch_norm(inputs[0])
    assert {kernel: len(found) for kernel, found in keys.items()} == {
        "paths_kernel": 1,
        "decay_kernel": 1,
        "project_kernel": 1,
        "segment_state_kernel": 2,  # forward and backward
        "carry_kernel": 2,
        "scan_forward_kernel": 2,  # whole sequences and segments
        "scan_backward_kernel": 1,
        "input_gradient_kernel": 1,
        "weight_gradient_kernel": 1,
        "norm_gate_kernel": 3,  # two of the maps have fewer pixels than a tile has rows
        "norm_gate_backward_kernel": 3,
        "squeeze_kernel": 3,
        "excite_kernel": 1,
        "gated_add_kernel": 3,
        "gate_gradient_kernel": 3,
        "branch_gradient_kernel": 3,
        "depthwise_kernel": 2,  # forward, and turned around backward
        "depthwise_gradient_kernel": 1,
        "statistics_kernel": 1,
        "finish_kernel": 1,
        "batch_norm_kernel": 1,
        "batch_norm_pool_kernel": 1,
        "batch_norm_sums_kernel": 1,
        "batch_norm_gradient_kernel": 1,
    }


@pytest.mark.parametrize("size", [(2, 8192, 8192), (1, 1, 2**25)], ids=str)
def test_no_map_is_too_long_for_a_grid(keys, size):
    pattern = "forward"  # the longest groups
    x, *parameters = map_and_parameters(*size, D=8)
    inputs = (x, *(p[:1] if p.dim() == 3 else p[: len(p) // 4] for p in parameters))
    y, states = triton_es2d.forward(*inputs, pattern, save=True)
    triton_es2d.backward(y, *inputs, states, pattern)
    assert "paths_kernel" in keys


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        pytest.param((0,), {"input_gradient_kernel"}, id="frozen parameters"),
        pytest.param((1, 2, 3, 4, 5), {"weight_gradient_kernel"}, id="first layer"),
        pytest.param((3,), set(), id="a bias"),
    ],
)
def test_products_of_gradients_that_nobody_wants_are_left_out(keys, wanted, products):
    inputs = map_and_parameters(2, 8, 8)
    y, states = triton_es2d.forward(*inputs, "es2d", save=True)
    triton_es2d.backward(y, *inputs, states, "es2d", [i in wanted for i in range(6)])
    assert {kernel for kernel in keys if "gradient" in kernel} == products
