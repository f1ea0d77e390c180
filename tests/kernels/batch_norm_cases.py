"""BatchNorm and activation, compared in all gradients with PyTorch in float64, wherever the kernels run."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_cases import relative_error

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
EPS, MOMENTUM = 1e-5, 0.3


def normalised(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """`activation(BatchNorm(x))` of a channels-last map as PyTorch has it."""
    n = F.batch_norm(x.permute(0, 3, 1, 2), None, None, weight, bias, training=True, eps=EPS)
    return ACTIVATIONS[activation](n.permute(0, 2, 3, 1))


def errors(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    activation: str,
    place: Callable[[Tensor], Tensor],
    *,
    gated: bool,
    mean: float = 1.0,
) -> dict[str, float]:
    """Relative errors of statistics, result, what is written again, and gradients; x has about this `mean`."""
    from evmamba.kernels import triton_batch_norm

    B, *_, C = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, dout = (mean + 2 * normal(*size)).to(dtype), normal(*size).to(dtype)
    weight, bias, running_mean, running_var = 1 + 0.5 * normal(C), normal(C), normal(C), normal(C).square()
    gate, d_sum = (normal(B, C), 0.1 * normal(B, C)) if gated else (None, None)

    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    active = normalised(*exact, activation)
    y = active if gate is None else active * gate.double()[:, None, None]
    loss = (y * dout.double()).sum()
    if d_sum is not None:
        loss = loss + (active.sum((1, 2)) * d_sum.double()).sum()
    loss.backward()
    norm = torch.nn.BatchNorm2d(C, eps=EPS, momentum=MOMENTUM).double()
    norm.running_mean, norm.running_var = running_mean.double(), running_var.double()
    norm(x.double().permute(0, 3, 1, 2))
    variance, of_x = torch.var_mean(x.double(), (0, 1, 2), correction=0)

    moving = place(running_mean.clone()), place(running_var.clone())
    stats = triton_batch_norm.statistics(place(x), *moving, MOMENTUM, EPS)
    given = (place(x), stats, place(weight), place(bias))
    placed_gate, placed_sum = (None if t is None else place(t) for t in (gate, d_sum))
    out = triton_batch_norm.forward(*given, placed_gate, activation)
    again = place(torch.full(size, torch.nan, dtype=dtype))
    gradients = triton_batch_norm.backward(place(dout), *given, placed_gate, placed_sum, activation, again)
    assert [t.dtype for t in (out, stats, *gradients)] == [dtype, torch.float32, dtype, torch.float32, torch.float32]
    return {
        "mean": relative_error(stats[0], of_x),
        "rstd": relative_error(stats[1], (variance + EPS).rsqrt()),
        "running_mean": relative_error(moving[0], norm.running_mean),
        "running_var": relative_error(moving[1], norm.running_var),
        "out": relative_error(out, y.detach()),
        "again": relative_error(again, y.detach()),
        "sum": relative_error(triton_batch_norm.pool(*given, None, activation), active.detach().sum((1, 2))),
        "product": relative_error(
            triton_batch_norm.pool(*given, place(dout), activation), (active.detach() * dout.double()).sum((1, 2))
        ),
        **{n: relative_error(d, e.grad) for n, d, e in zip(("x", "weight", "bias"), gradients, exact, strict=True)},
    }


ROUNDED = ("out", "again", "x")  # to the map's type
