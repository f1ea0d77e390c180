"""The published network's way to the same result, written plainly in PyTorch: what the benchmark compares with.

Copies the map into four strided groups, projects them as `[B, K, D, L]`, casts everything to float32, scans with the
CUDA kernel of mamba_ssm where that is installed (else a loop over tokens), and copies the groups back into a map. It is
here to be measured and to be a second opinion on the definition; nothing else uses it.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (u, delta [b, K D, L], A [K D, N], B, C [b, K, N, L], D, bias [K D]) -> [b, K D, L]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def other_scans() -> dict[str, Scan]:
    """Scans of other projects that need no GPU, by the project's name, as far as they are installed."""
    found: dict[str, Scan] = {}
    if importlib.util.find_spec("mambapy"):
        found["mambapy"] = _mambapy
    with contextlib.suppress(ImportError, AttributeError):
        mamba = importlib.import_module("transformers.models.mamba.modeling_mamba")
        found["transformers"] = functools.partial(_transformers, mamba.mamba_selective_scan)
    return found


def scan_name() -> str:
    """Which scan `original_es2d` runs."""
    return "mamba_ssm" if importlib.util.find_spec("mamba_ssm") else "loop over tokens"


def original_es2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    scan: Scan | None = None,
) -> Tensor:
    """Shapes as `es2d_scan`: x `[B, H, W, D]`, result float32 `[B, H, W, D]`; `scan` None: as `scan_name` says."""
    B, H, W, D = x.shape
    K, _, R = dt_projs_weight.shape
    N = A_logs.shape[1]
    xs = _partition(x.permute(0, 3, 1, 2).contiguous())
    L = xs.shape[-1]
    projected = torch.einsum("bkdl,kcd->bkcl", xs, x_proj_weight.to(x.dtype))
    dt_low, Bs, Cs = projected.split([R, N, N], dim=2)
    dts = torch.einsum("bkrl,kdr->bkdl", dt_low, dt_projs_weight.to(x.dtype))
    ys = (scan or _selective_scan())(
        xs.float().reshape(B, K * D, L),
        dts.contiguous().float().reshape(B, K * D, L),
        -A_logs.float().exp(),
        Bs.contiguous().float(),
        Cs.contiguous().float(),
        Ds.float(),
        dt_projs_bias.float().flatten(),
    )
    return _merge(ys.view(B, K, D, L), H, W).permute(0, 2, 3, 1).contiguous()


def _partition(x: Tensor) -> Tensor:
    # Four copies with stride 2, two of them transposed: [B, 4, D, L].
    H, W = x.shape[-2:]
    x = F.pad(x, (0, W % 2, 0, H % 2))
    groups = x[..., 0::2, 0::2], x[..., 1::2, 0::2].mT, x[..., 0::2, 1::2], x[..., 1::2, 1::2].mT
    return torch.stack([group.flatten(2) for group in groups], dim=1)


def _merge(ys: Tensor, H: int, W: int) -> Tensor:
    B, _, D, _ = ys.shape
    h, w = (H + 1) // 2, (W + 1) // 2
    y = ys.new_empty(B, D, 2 * h, 2 * w)
    y[..., 0::2, 0::2] = ys[:, 0].view(B, D, h, w)
    y[..., 1::2, 0::2] = ys[:, 1].view(B, D, w, h).mT
    y[..., 0::2, 1::2] = ys[:, 2].view(B, D, h, w)
    y[..., 1::2, 1::2] = ys[:, 3].view(B, D, w, h).mT
    return y[..., :H, :W]


def _selective_scan() -> Scan:
    if scan_name() == "mamba_ssm":
        selective_scan_fn = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        return lambda u, delta, A, B, C, D, bias: selective_scan_fn(u, delta, A, B, C, D, None, bias, True)
    return _loop


def _loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    # u, delta [b, K D, L]; A [K D, N]; B, C [b, K, N, L]
    batch, channels, L = u.shape
    delta = F.softplus(delta + bias[:, None])
    per_group = channels // B.shape[1]
    h = u.new_zeros(batch, channels, A.shape[1])
    outputs = []
    for t in range(L):
        Bt, Ct = (m[..., t].repeat_interleave(per_group, dim=1) for m in (B, C))
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * Bt
        outputs.append((h * Ct).sum(-1))
    return torch.stack(outputs, dim=-1) + u * D[:, None]


def _mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """mambapy's parallel scan, prepared as its `MambaBlock` does."""
    pscan = importlib.import_module("mambapy.pscan").pscan
    per_group = u.shape[1] // B.shape[1]
    u, delta = u.mT, F.softplus(delta + bias[:, None]).mT  # [b, L, K D]
    B, C = (m.permute(0, 3, 1, 2).repeat_interleave(per_group, dim=2) for m in (B, C))  # [b, L, K D, N]
    states = pscan(torch.exp(delta[..., None] * A), (delta * u)[..., None] * B)
    return ((states * C).sum(-1) + u * D).mT


def _transformers(
    function: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """transformers' path without kernels: one call a group, as it knows no groups."""
    K = B.shape[1]
    groups = zip(*(t.chunk(K, dim) for t, dim in ((u, 1), (delta, 1), (A, 0), (D, 0), (bias, 0))), strict=True)
    return torch.cat(
        [
            function(u, delta, A, B[:, k], C[:, k], D, delta_bias=bias, delta_softplus=True)  # type: ignore[call-arg]
            for k, (u, delta, A, D, bias) in enumerate(groups)
        ],
        dim=1,
    )


class SelectiveScan(torch.autograd.Function):
    """Memory of mamba_ssm's CUDA scan without its numbers, to count with: what it allocates and keeps for its backward.

    Of mamba_ssm 2's `SelectiveScanFn` without z, in float32: the result and, every 2048 tokens, 2 N numbers a channel;
    all inputs are kept.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        batch, channels, L = u.shape
        states = u.new_empty(batch, channels, -(-L // 2048), 2 * A.shape[1])
        ctx.save_for_backward(u, delta, A, B, C, D, bias, states)
        return torch.empty_like(delta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        *inputs, _ = ctx.saved_tensors
        return tuple(torch.empty_like(tensor) for tensor in inputs)


def counted_es2d(*inputs: Tensor) -> Tensor:
    """`original_es2d` with mamba_ssm's scan as `SelectiveScan`, for tensors without memory."""
    x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds = inputs
    return original_es2d(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, scan=SelectiveScan.apply)
