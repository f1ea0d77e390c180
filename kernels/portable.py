"""The scan as a graph of standard operators: for ONNX and other runtimes without our ops. For inference.

The map is cut into the scan's groups by slices and transpositions, not by an index table, whose values a graph with
dynamic sizes cannot hold. The recurrence is one `scan` operator, which takes sequences of any length, or without loops
a parallel scan written out for one length, for runtimes that have no such operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan as scan_operator

from .paths import PATTERNS, Pattern
from .reference import scan_type

_active: bool = False
_loops: bool = True


@contextmanager
def portable_scan(loops: bool = True) -> Iterator[None]:
    """Within this context the public scans are traced as standard operators (in all threads).

    Without `loops` the graph has no control flow, and holds for the sizes it is traced with.
    """
    global _active, _loops
    before = _active, _loops
    _active, _loops = True, loops
    try:
        yield
    finally:
        _active, _loops = before


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
    _, H, W, D = x.shape
    K, _, R = dt_projs_weight.shape
    N = A_logs.shape[1]
    dtype = scan_type(x)

    order = PATTERNS[pattern]
    tokens = _split(x, order).to(dtype)  # [B, K, L, D]
    x_proj, dt_proj = (weight.to(x.dtype).to(dtype) for weight in (x_proj_weight, dt_projs_weight))
    dt_low, Bt, Ct = torch.matmul(tokens, x_proj.mT).split([R, N, N], dim=-1)
    delta = F.softplus(torch.matmul(dt_low, dt_proj.mT) + dt_projs_bias.to(dtype)[:, None])
    A = -A_logs.to(dtype).exp().view(K, D, N)

    inputs = tuple(part.permute(2, 0, 1, 3) for part in (delta, delta * tokens, Bt, Ct))
    y, _ = recurrence(A, *inputs)
    return _merge(y.permute(1, 2, 0, 3) + tokens * Ds.to(dtype).view(K, 1, D), H, W, order)


def recurrence(A: Tensor, delta: Tensor, u: Tensor, Bt: Tensor, Ct: Tensor) -> tuple[Tensor, Tensor]:
    """`y_t = C_t . h_t` with `h_t = exp(delta_t A) h_{t-1} + B_t u_t`, and the last state.

    A `[K, D, N]`, delta and u `[L, B, K, D]`, Bt and Ct `[L, B, K, N]`. Returns `[L, B, K, D]` and `[B, K, D, N]`.
    """
    if not _loops:
        states = _prefix(torch.exp(delta[..., None] * A), u[..., None] * Bt[:, :, :, None])
        return (states * Ct[:, :, :, None]).sum(-1), states[-1]

    def step(h: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta_t, u_t, B_t, C_t = inputs
        h = torch.exp(delta_t[..., None] * A) * h + u_t[..., None] * B_t[:, :, None]
        return h, (h * C_t[:, :, None]).sum(-1)

    last_state, y = scan_operator(step, u.new_zeros(u.shape[1], *A.shape), (delta, u, Bt, Ct))
    return y, last_state


def _prefix(decay: Tensor, state: Tensor) -> Tensor:
    """All h of `h_t = decay_t h_{t-1} + state_t` along the first axis: those of every second token from half as many
    tokens, two taken together, and the others from their neighbours. Products of decays only, so nothing overflows."""
    L = len(state)
    if L == 1:
        return state
    pairs = L // 2
    first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    odd = _prefix(decay[first] * decay[second], decay[second] * state[first] + state[second])
    even = torch.cat([state[:1], decay[2::2] * odd[: (L - 1) // 2] + state[2::2]])
    both = torch.stack([even[:pairs], odd], dim=1).flatten(0, 1)
    return torch.cat([both, even[pairs:]]) if L % 2 else both


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
