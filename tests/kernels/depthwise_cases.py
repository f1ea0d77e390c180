"""The depthwise convolution, compared in all gradients with PyTorch in float64, wherever the kernels run."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_cases import relative_error

ACTIVATIONS = {"none": lambda v: v, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def errors(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    activation: str,
    place: Callable[[Tensor], Tensor],
    *,
    with_bias: bool = True,
) -> dict[str, float]:
    """Relative errors of the result and of all gradients; the map is the first half of a wider one."""
    from evmamba.kernels import triton_depthwise

    *_, C = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*size[:3], 2 * C, generator=generator).to(dtype).chunk(2, dim=-1)[0]
    weight = torch.randn(C, 1, 3, 3, generator=generator)
    bias = torch.randn(C, generator=generator) if with_bias else None
    dout = torch.randn(size, generator=generator).to(dtype)

    inputs = [t for t in (x, weight, bias) if t is not None]
    exact = [t.to(dtype).double().requires_grad_() for t in inputs]
    convolved = F.conv2d(exact[0].permute(0, 3, 1, 2), *exact[1:], padding=1, groups=C).permute(0, 2, 3, 1)
    expected = ACTIVATIONS[activation](convolved)
    expected.backward(dout.double())

    placed = [None if t is None else place(t) for t in (x, weight, bias)]
    out = triton_depthwise.forward(*placed, activation)
    gradients = triton_depthwise.backward(place(dout), *placed, activation)
    assert out.dtype == dtype
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]
    found = {"out": relative_error(out, expected.detach())}
    pairs = zip(("x", "weight", "bias"), gradients, exact, strict=False)
    return found | {name: relative_error(gradient, e.grad) for name, gradient, e in pairs}
