"""Linear layers of float32 on AMD's CPUs with AVX-512 by oneDNN's product, where PyTorch takes the BLAS library's.

The BLAS library of PyTorch's x86 builds (MKL) keeps to 8 lanes there on processors that have 16; oneDNN, with which
PyTorch convolves, does not. Its sums are the same for any number of threads.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import is_plain, is_plain_float32

# Multiply-adds from which it pays to hand weights to oneDNN, which rearranges them in each call.
LEAST = 2**20
_CPU_FILE = Path("/proc/cpuinfo")

Product = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x `[..., C]`, weight `[C', C]`, bias `[C']`, result `[..., C']`, all of one float type.

    By oneDNN where that was found to be faster: eager float32 of a million multiply-adds or more on AMD's CPUs with
    AVX-512. Elsewhere, traced, counted, under autocast, within `torch.func` or with EVMAMBA_BACKEND=torch it is
    PyTorch's own.
    """
    if not _pays(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _multiply(x, weight, bias)


def affine_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.relu(affine(x, weight, bias))` by one operator, where neither is needed for gradients."""
    if _pays(x, weight, bias):
        return _multiply(x, weight, bias, "relu")
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """`nn.Linear` by `affine`."""

    def forward(self, input: Tensor) -> Tensor:
        return affine(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        return (
            affine(dy, weight.T) if of_x else None,
            rows.T @ x.reshape(-1, x.shape[-1]) if of_weight else None,  # over all tokens: no faster by oneDNN
            rows.sum(0) if of_bias else None,
        )


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: whoever traces is not to be asked for a file, nor about shapes
        and _may_be_faster()
        and is_plain_float32(x)
        and x.numel() * len(weight) >= LEAST
        and x.dim() > 1
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])  # it is read without a look at its size
        and all(is_plain(t) and (t is None or t.dtype == torch.float32) for t in (x, weight, bias))
        and os.environ.get("EVMAMBA_BACKEND") != "torch"
        and bool(torch.backends.mkldnn.enabled)
        and _onednn() is not None
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    product = _onednn()
    assert product is not None
    return product(x, weight, bias, activation)


@cache
def _may_be_faster() -> bool:
    """Whether this is a processor of AMD's with 16 lanes. On Intel's, and on AMD's with 8, oneDNN is no faster; others
    were not measured."""
    try:
        return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _CPU_FILE.read_text()
    except OSError:
        return False


@cache
def _onednn() -> Product | None:
    """oneDNN's product of ordinary tensors, which TorchInductor calls too. PyTorch promises nobody its name or
    arguments, so it is tried: None where it is missing, or is another thing than it was."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        bias = None if bias is None else bias.contiguous()  # it is read as if it were
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")

    with torch.inference_mode():
        numbers = torch.arange(24, dtype=torch.float32, device="cpu") - 9
        x, weight, bias = numbers.view(1, 4, 6)[..., :3], numbers.view(3, 8).T, numbers[::3]
        expected = F.linear(x, weight, bias)
        try:
            right = all(
                torch.equal(product(x, weight, bias, activation), result)
                for activation, result in (("none", expected), ("relu", expected.relu()))
            )
        except (AttributeError, RuntimeError, TypeError):
            return None
    return product if right else None
