"""The scan as a graph of standard operators with dynamic height and width: for ONNX and other runtimes without our ops.

The map is cut into the scan's groups by slices and transpositions, not by an index table, whose values a graph with
dynamic sizes cannot hold, and the recurrence is one `scan` operator. For inference; slow in eager mode.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan as scan_operator

from .reference import scan_type

_active = False


@contextmanager
def portable_scan() -> Iterator[None]:
    """Within this context the public scans are traced as standard operators (in all threads)."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


def is_portable() -> bool:
    """Whether a `portable_scan` is active."""
    return _active


def scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> Tensor:
    """As `reference.scan`, which see for shapes and types; without gradients."""
    B, H, W, D = x.shape
    K, _, R = dt_projs_weight.shape
    N = A_logs.shape[1]
    dtype = scan_type(x)

    tokens = _split(x, pattern).to(dtype)  # [B, K, L, D]
    x_proj, dt_proj = (weight.to(x.dtype).to(dtype) for weight in (x_proj_weight, dt_projs_weight))
    dt_low, Bt, Ct = torch.matmul(tokens, x_proj.mT).split([R, N, N], dim=-1)
    delta = F.softplus(torch.matmul(dt_low, dt_proj.mT) + dt_projs_bias.to(dtype)[:, None])
    A = -A_logs.to(dtype).exp().view(K, D, N)

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta_t, u_t, B_t, C_t = inputs  # [B, K, D] twice, [B, K, N] twice
        h = torch.exp(delta_t[..., None] * A) * h + u_t[..., None] * B_t[:, :, None]
        return h, (h * C_t[:, :, None]).sum(-1)

    inputs = tuple(part.permute(2, 0, 1, 3) for part in (delta, delta * tokens, Bt, Ct))
    _, y = scan_operator(step, x.new_zeros(B, K, D, N, dtype=dtype), inputs)
    return _merge(y.permute(1, 2, 0, 3) + tokens * Ds.to(dtype).view(K, 1, D), H, W, pattern)


def _split(x: Tensor, pattern: str) -> Tensor:
    """Tokens `[B, K, L, D]` of a map `[B, H, W, D]`, in the order of `paths.scan_paths`; padding tokens are zero."""
    _, H, W, _ = x.shape
    if pattern == "es2d":
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        maps = [x[:, 0::2, 0::2], x[:, 1::2, 0::2].transpose(1, 2), x[:, 0::2, 1::2], x[:, 1::2, 1::2].transpose(1, 2)]
    elif pattern == "ss2d":
        maps = [x, x.transpose(1, 2), x.flip(1, 2), x.transpose(1, 2).flip(1, 2)]
    else:
        maps = [x if pattern == "forward" else x.flip(1, 2)]
    return torch.stack([part.flatten(1, 2) for part in maps], dim=1)


def _merge(y: Tensor, H: int, W: int, pattern: str) -> Tensor:
    """Map `[B, H, W, D]` with, at every pixel, the sum of the tokens `[B, K, L, D]` taken from it."""
    if pattern == "es2d":
        h, w = (H + 1) // 2, (W + 1) // 2
        even_rows = torch.stack([y[:, 0].unflatten(1, (h, w)), y[:, 2].unflatten(1, (h, w))], dim=3)
        odd_rows = torch.stack([_columns_first(y[:, 1], h, w), _columns_first(y[:, 3], h, w)], dim=3)
        return torch.stack([even_rows.flatten(2, 3), odd_rows.flatten(2, 3)], dim=2).flatten(1, 2)[:, :H, :W]
    if pattern == "ss2d":
        rows = y[:, 0] + y[:, 2].flip(1)
        columns = y[:, 1] + y[:, 3].flip(1)
        return rows.unflatten(1, (H, W)) + _columns_first(columns, H, W)
    return (y[:, 0] if pattern == "forward" else y[:, 0].flip(1)).unflatten(1, (H, W))


def _columns_first(y: Tensor, h: int, w: int) -> Tensor:
    """Map `[B, h, w, D]` of tokens `[B, h w, D]` that run down the columns."""
    return y.unflatten(1, (w, h)).transpose(1, 2)
