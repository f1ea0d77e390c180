"""The selective scan over a map, by definition: the oracle of every test, written to be read, not to be fast.

EfficientVMamba, arXiv 2403.09977: eq. 2-4 (discretised state space), eq. 5 (atrous groups). Names: B, H, W, D batch,
rows, columns, inner channels; N state size; R rank of the step projection; K groups of L tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .paths import scan_paths


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
    K, _, R = dt_projs_weight.shape
    N = A_logs.shape[1]
    dtype = scan_type(x)
    paths = scan_paths(H, W, pattern, x.device)

    tokens = gather_tokens(x, paths).to(dtype)
    x_proj, dt_proj = (weight.to(x.dtype).to(dtype) for weight in (x_proj_weight, dt_projs_weight))
    dt_low, Bt, Ct = torch.einsum("bkld,ksd->bkls", tokens, x_proj).split([R, N, N], dim=-1)
    delta = F.softplus(torch.einsum("bklr,kdr->bkld", dt_low, dt_proj) + dt_projs_bias.to(dtype)[:, None])
    A = -A_logs.to(dtype).exp().view(K, D, N)

    h = tokens.new_zeros(x.shape[0], K, D, N)
    outputs = []
    for t in range(paths.shape[1]):
        decay = torch.exp(delta[:, :, t, :, None] * A)
        h = decay * h + (delta * tokens)[:, :, t, :, None] * Bt[:, :, t, None]
        outputs.append((h * Ct[:, :, t, None]).sum(-1))
    y = torch.stack(outputs, dim=2) + tokens * Ds.to(dtype).view(K, 1, D)
    return merge_tokens(y, paths, H, W)
