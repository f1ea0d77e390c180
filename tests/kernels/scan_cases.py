"""Scans drawn like a network's, compared in all gradients with the float64 definition, wherever the kernels run."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from evmamba.kernels import reference, triton_es2d
from evmamba.kernels.paths import PATTERNS
from evmamba.kernels.tuning import Tuning

NAMES = ("x", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
# B, H, W, D, N, R
Size = tuple[int, int, int, int, int, int]


def make_inputs(size: Size, pattern: str, dtype: torch.dtype = torch.float32, steps: str = "ordinary") -> list[Tensor]:
    """The map in `dtype` and the parameters in float32.

    `steps` says how large the step sizes are: "ordinary" (about 0.2), "small" as Mamba draws them (1e-3 to 0.1), or
    "large" (8 to 25). "unrounded" are ordinary ones of weights that have more digits than the map's type, as those of
    "small"; only what an unrounded projection adds to a step is far larger there.
    """
    B, H, W, D, N, R = size
    generator = torch.Generator().manual_seed(0)
    K = PATTERNS[pattern].sets

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(K, D, generator=generator)

    if steps == "small":
        delta = uniform(math.log(1e-3), math.log(0.1)).exp()
        bias = delta + torch.log(-torch.expm1(-delta))  # softplus turns it into delta
    else:
        bias = uniform(8, 25) if steps == "large" else normal(K, D) - 1.5
    low_rank = {"ordinary": 1.0, "unrounded": 1.0, "small": 0.1, "large": 0.1}[steps]
    parameters = [
        normal(K, R + 2 * N, D) * D**-0.5,
        normal(K, D, R) * R**-0.5 * low_rank,
        bias,
        torch.log(torch.arange(1, N + 1.0)).repeat(K * D, 1) + 0.2 * normal(K * D, N),
        1 + 0.2 * normal(K * D),
    ]
    if steps in ("ordinary", "large"):  # values of the map's type, so that rounding a weight to it changes nothing
        parameters = [t.to(dtype).float() for t in parameters]
    return [normal(B, H, W, D).to(dtype), *parameters]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the error by the norm of what was expected."""
    return ((value.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def definition(inputs: list[Tensor], pattern: str, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and all gradients in float64; projection weights are rounded to the map's type, as the scan does."""
    rounded = [t.to(inputs[0].dtype) if i in (1, 2) else t for i, t in enumerate(inputs)]
    exact = [t.detach().double().cpu().requires_grad_() for t in rounded]
    expected = reference.scan(*exact, pattern)
    expected.backward(dy.double().cpu())
    return expected.detach(), {name: t.grad for name, t in zip(NAMES, exact, strict=True) if t.grad is not None}


def gradient_seed(size: Size) -> Tensor:
    """The same dy for everyone."""
    B, H, W, D, *_ = size
    return torch.randn(B, H, W, D, generator=torch.Generator().manual_seed(1))


def run(
    inputs: list[Tensor], pattern: str, dy: Tensor, place: Callable[[Tensor], Tensor], tuning: Tuning | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """y and all gradients of the kernels, on the device that `place` moves the tensors to."""
    size: Size = (*inputs[0].shape, inputs[4].shape[1], inputs[2].shape[2])  # type: ignore[assignment]
    placed = [place(t) for t in inputs]
    y, empty = triton_es2d.forward(*placed, pattern, save=False, tuning=tuning)
    assert empty.numel() == 0
    assert y.dtype == torch.float32
    assert y.shape == inputs[0].shape
    y_train, states = triton_es2d.forward(*placed, pattern, save=True, tuning=tuning)
    assert torch.equal(y, y_train)
    assert states.shape == triton_es2d.states_shape(*size[:5], pattern)
    gradients = triton_es2d.backward(place(dy), *placed, states, pattern, tuning=tuning)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
    return y, dict(zip(NAMES, gradients, strict=True))


def errors(
    size: Size,
    pattern: str,
    dtype: torch.dtype = torch.float32,
    steps: str = "ordinary",
    place: Callable[[Tensor], Tensor] = lambda t: t,
    tuning: Tuning | None = None,
) -> dict[str, float]:
    """Relative errors of y and of every gradient."""
    inputs, dy = make_inputs(size, pattern, dtype, steps), gradient_seed(size)
    expected, wanted = definition(inputs, pattern, dy)
    y, gradients = run(inputs, pattern, dy, place, tuning)
    return {"y": relative_error(y, expected)} | {name: relative_error(gradients[name], wanted[name]) for name in NAMES}
