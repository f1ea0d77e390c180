"""A CPU backend against the float64 definition: cases and comparisons that the backends' tests share."""

from types import ModuleType

import torch
from torch import Tensor

from evmamba.kernels import reference

from .conftest import GRADIENT_TOLERANCE, MAP_TOLERANCE, close

SHAPES = {  # B, H, W, D, N, R
    "even": (2, 8, 6, 6, 16, 2),
    "odd": (2, 7, 5, 8, 4, 1),
    "odd columns": (1, 6, 13, 3, 5, 2),
    "one row": (2, 1, 37, 4, 8, 1),
    "one column": (1, 34, 1, 4, 1, 3),
    "one pixel": (3, 1, 1, 5, 3, 1),
    "one channel": (1, 5, 4, 1, 64, 1),
    "prime": (1, 11, 17, 7, 16, 3),
    "one chunk": (1, 8, 8, 4, 2, 1),
    "one token over": (1, 2, 34, 4, 2, 1),
    "empty batch": (0, 4, 5, 4, 2, 1),
}
# Bias of the steps, logarithm of the decay: the state is forgotten at once, steps vanish, or nothing decays.
EXTREMES = {"forget": (60.0, 4.0), "skip": (-120.0, 0.0), "keep": (3.0, -30.0)}


def run(backend: ModuleType, inputs: list[Tensor], pattern: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A backend's map, the gradient of the map drawn from a fixed seed, and what the backend makes of it."""
    y, states = backend.forward(*inputs, pattern, save=True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, dy, backend.backward(dy, *inputs, states, pattern)


def define(inputs: list[Tensor], dy: Tensor, pattern: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The map and the gradients by the definition, in float64."""
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    y = reference.scan(*inputs, pattern)
    return y.detach(), torch.autograd.grad(y, inputs, dy.double())


def check(backend: ModuleType, inputs: list[Tensor], pattern: str) -> None:
    """The map, in float32 at least, and all gradients, in the inputs' types, within their tolerances."""
    y, dy, gradients = run(backend, inputs, pattern)
    y_defined, gradients_defined = define(inputs, dy, pattern)
    dtype = inputs[0].dtype
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    close(y, y_defined, MAP_TOLERANCE[dtype])
    for tensor, gradient, defined in zip(inputs, gradients, gradients_defined, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.is_contiguous()
        close(gradient, defined, GRADIENT_TOLERANCE[dtype])


def check_extreme(backend: ModuleType, inputs: list[Tensor], bias: float, A_log: float) -> None:
    """Neither overflow nor drift where every step's bias and decay are one of `EXTREMES`."""
    inputs[3].fill_(bias)
    inputs[4].fill_(A_log)
    y, dy, gradients = run(backend, inputs, "es2d")
    y_defined, gradients_defined = define(inputs, dy, "es2d")
    close(y, y_defined, 1e-5)
    for gradient, defined in zip(gradients, gradients_defined, strict=True):
        assert gradient.isfinite().all()
        scale = max(defined.abs().max().item(), 1e-30)  # gradients that vanish in float32 may
        assert (gradient.double() - defined).abs().max().item() <= 1e-5 * scale + 1e-30


def check_strided(backend: ModuleType, inputs: list[Tensor], tolerance: float) -> None:
    """Inputs and gradients of any strides give the same; `tolerance` 0: the same bits."""
    strided = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in inputs]
    strided[0] = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    y, dy, gradients = run(backend, inputs, "es2d")
    y_strided, states = backend.forward(*strided, "es2d", save=True)
    dy_strided = dy.transpose(1, 2).contiguous().transpose(1, 2)
    close(y_strided, y, tolerance)
    for gradient, expected in zip(backend.backward(dy_strided, *strided, states, "es2d"), gradients, strict=True):
        close(gradient, expected, tolerance)


def check_alone(backend: ModuleType, inputs: list[Tensor], i: int) -> None:
    """Where only gradient `i` is wanted it is the same, and the others are left out."""
    y, states = backend.forward(*inputs, "es2d", save=True)
    every = backend.backward(y, *inputs, states, "es2d")
    only = backend.backward(y, *inputs, states, "es2d", [j == i for j in range(6)])
    assert torch.equal(only[i], every[i])
    assert [j for j, gradient in enumerate(only) if gradient is not None] == [i]
