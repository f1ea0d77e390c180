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

from .paths import PATTERNS, Pattern
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

    order = PATTERNS[pattern]
    tokens = _split(x, order).to(dtype)  # [B, K, L, D]
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
    return _merge(y.permute(1, 2, 0, 3) + tokens * Ds.to(dtype).view(K, 1, D), H, W, order)


def _split(x: Tensor, pattern: Pattern) -> Tensor:
    """Tokens `[B, K, L, D]` of a map `[B, H, W, D]`, in the order of `Pattern.paths`; padding tokens are zero."""
    _, H, W, _ = x.shape
    step = pattern.step
    rows, columns = pattern.size(H, W)
    if step > 1:
        x = F.pad(x, (0, 0, 0, columns * step - W, 0, rows * step - H))
    groups = []
    for group in pattern.groups:
        part = x[:, group.row :: step, group.column :: step]
        tokens = (part.transpose(1, 2) if group.down else part).flatten(1, 2)
        groups.append(tokens.flip(1) if group.backwards else tokens)
    return torch.stack(groups, dim=1)


def _merge(y: Tensor, H: int, W: int, pattern: Pattern) -> Tensor:
    """Map `[B, H, W, D]` with, at every pixel, the sum of the tokens `[B, K, L, D]` taken from it."""
    step = pattern.step
    rows, columns = pattern.size(H, W)
    parts: dict[tuple[int, int], Tensor] = {}  # [B, rows, columns, D] by first row and column
    for k, group in enumerate(pattern.groups):
        tokens = y[:, k].flip(1) if group.backwards else y[:, k]
        part = (
            tokens.unflatten(1, (columns, rows)).transpose(1, 2) if group.down else tokens.unflatten(1, (rows, columns))
        )
        start = group.row, group.column
        parts[start] = parts[start] + part if start in parts else part
    if step == 1:
        return parts[0, 0]
    strips = [torch.stack([parts[row, column] for column in range(step)], dim=3).flatten(2, 3) for row in range(step)]
    return torch.stack(strips, dim=2).flatten(1, 2)[:, :H, :W]
