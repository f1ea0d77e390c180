"""The selective scan over a map, by definition: the oracle of every test, written to be read, not to be fast.

EfficientVMamba, arXiv 2403.09977: eq. 1-4 (state space model, discretised), eq. 5 (ES2D). Names: B, H, W, D batch,
rows, columns, inner channels; N state size; R rank of the step projection; K groups of L tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .paths import Pattern, scan_paths

# Which gradients a backward is asked for: of x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds.
Wanted = Sequence[bool]
ALL_WANTED = (True,) * 6


def scan_type(x: Tensor) -> torch.dtype:
    """Type in which the recurrence runs: float64 for float64 maps, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gather_tokens(x: Tensor, paths: Tensor) -> Tensor:
    """Tokens `[B, K, L, D]` of a map `[B, H, W, D]` in scan order; padding tokens (index -1) are zero."""
    pixels = F.pad(x.flatten(1, 2), (0, 0, 0, 1))  # the row that index -1 reads
    return pixels[:, paths.long()]


def merge_tokens(y: Tensor, paths: Tensor, H: int, W: int) -> Tensor:
    """Map `[B, H, W, D]` with, at every pixel, the sum of the tokens `[B, K, L, D]` taken from it."""
    B, _, _, D = y.shape
    rows = torch.where(paths < 0, H * W, paths).flatten().long()
    return y.new_zeros(B, H * W + 1, D).index_add(1, rows, y.flatten(1, 2))[:, :-1].reshape(B, H, W, D)


def scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> Tensor:
    """Project, scan and merge: `y_t = C_t . h_t + D x_t` with `h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t`.

    x `[B, H, W, D]`; x_proj_weight `[K, R + 2N, D]`; dt_projs_weight `[K, D, R]`; dt_projs_bias `[K, D]`;
    A_logs `[K D, N]`; Ds `[K D]`; pattern as in `paths.py`. Returns `[B, H, W, D]` in `scan_type(x)`, differentiable.
    The operands of the projections are rounded to x's type; everything after them is of the scan's type.
    """
    _, H, W, D = x.shape
    N = A_logs.shape[1]
    dtype = scan_type(x)
    paths = scan_paths(H, W, pattern, x.device)
    K = len(paths)

    tokens = gather_tokens(x, paths)
    delta, Bt, Ct = _project(tokens, x_proj_weight, dt_projs_weight, dt_projs_bias)
    tokens = tokens.to(dtype)
    A = -A_logs.to(dtype).exp().view(K, D, N)

    y, _ = recurrence(tokens, delta, A, Bt, Ct)
    y = y + tokens * Ds.to(dtype).view(K, 1, D)
    return merge_tokens(y, paths, H, W)


def recurrence(x: Tensor, delta: Tensor, A: Tensor, Bt: Tensor, Ct: Tensor) -> tuple[Tensor, Tensor]:
    """`y_t = C_t . h_t` with `h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t`, and the state after the last token.

    x and delta `[B, K, L, D]`, A `[K, D, N]`, Bt and Ct `[B, K, L, N]`, all of one type. Returns `[B, K, L, D]` and
    `[B, K, D, N]`.
    """
    h = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[2]):
        decay = torch.exp(delta[:, :, t, :, None] * A)
        h = decay * h + (delta * x)[:, :, t, :, None] * Bt[:, :, t, None]
        outputs.append((h * Ct[:, :, t, None]).sum(-1))
    return torch.stack(outputs, dim=2), h


def step_sizes(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, pattern: Pattern
) -> Tensor:
    """Delta of every token, `[B, K, L, D]` in the order of `pattern.paths`: what a scan of `x` `[B, H, W, D]` steps by.

    The parameters as in :func:`scan`, one set for each of `pattern.sets`.
    """
    tokens = gather_tokens(x, pattern.paths(x.shape[1], x.shape[2], x.device))
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias)
    repeats = len(pattern.groups) // pattern.sets
    return _project(tokens, *(weight.repeat(repeats, *[1] * (weight.dim() - 1)) for weight in weights))[0]


def _project(
    tokens: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Delta `[B, K, L, D]` and B and C `[B, K, L, N]` of tokens `[B, K, L, D]`, in the scan's type."""
    dtype = scan_type(tokens)
    x_proj, dt_proj = (weight.to(tokens.dtype).to(dtype) for weight in (x_proj_weight, dt_projs_weight))
    R = dt_proj.shape[2]
    N = (x_proj.shape[1] - R) // 2
    dt_low, Bt, Ct = torch.einsum("bkld,ksd->bkls", tokens.to(dtype), x_proj).split([R, N, N], dim=-1)
    delta = F.softplus(torch.einsum("bklr,kdr->bkld", dt_low, dt_proj) + dt_projs_bias.to(dtype)[:, None])
    return delta, Bt, Ct
