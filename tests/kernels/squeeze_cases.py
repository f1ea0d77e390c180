"""The tail of an EVSS block, compared in all gradients with PyTorch in float64, wherever the kernels run."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_cases import relative_error

NAMES = ("x", "u", "v", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
Place = Callable[[Tensor], Tensor]


def definition(x: Tensor, u: Tensor, v: Tensor, *parameters: Tensor, keep: Tensor | None) -> Tensor:
    """As the blocks' modules compute it."""
    norm_weight, norm_bias, w1, b1, w2, b2 = parameters

    def gated(m: Tensor) -> Tensor:
        squeezed = F.layer_norm(m, m.shape[-1:], norm_weight, norm_bias).mean((1, 2), keepdim=True)
        return m * F.linear(F.gelu(F.linear(squeezed, w1, b1)), w2, b2).sigmoid()

    change = gated(u) + gated(v)
    return x + (change if keep is None else change * keep[:, None, None, None])


def make_inputs(size: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """The maps, x in float32 as under autocast, and the parameters."""
    B, H, W, C = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps = [normal(B, H, W, C), (1 + normal(B, H, W, C)).to(dtype), (normal(B, H, W, C) - 1).to(dtype)]
    S = max(1, C // 8)
    return [*maps, 1 + normal(C), normal(C), 3 * normal(S, C) * C**-0.5, normal(S), normal(C, S), normal(C)]


def errors(size: tuple[int, int, int, int], dtype: torch.dtype, place: Place, *, drop: bool) -> dict[str, float]:
    """Relative errors of the result, of what is kept and of every gradient, through the operators' own backward."""
    from evmamba.kernels import squeeze_excite, triton_squeeze

    inputs = make_inputs(size, dtype)
    keep = torch.tensor([0.0, 1.5] * size[0])[: size[0]] if drop else None
    dout = torch.randn(size, generator=torch.Generator().manual_seed(1))
    exact = [t.double().requires_grad_() for t in inputs]
    expected = definition(*exact, keep=None if keep is None else keep.double())
    expected.backward(dout.double())

    placed = [place(t) for t in inputs]
    placed_keep = None if keep is None else place(keep)
    out, mean, gates = triton_squeeze.forward(*placed, placed_keep, 1e-5)
    assert out.dtype == torch.float32

    class Context:
        saved_tensors = (*placed[1:], placed_keep, mean, gates)
        eps = 1e-5
        type_of_x = torch.float32

    gradients = squeeze_excite._backward(Context, place(dout), None, None)[:9]
    assert [gradient.dtype for gradient in gradients] == [t.dtype for t in inputs]
    of_gradients = zip(NAMES, gradients, exact, strict=True)
    return {"out": relative_error(out, expected.detach())} | {n: relative_error(d, e.grad) for n, d, e in of_gradients}
