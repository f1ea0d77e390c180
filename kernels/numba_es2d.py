"""The compiled CPU backend of the 2-D scans: what it prepares for its kernels, their order, and what it hands over.

The kernels: numba_forward.py, numba_backward.py. Channels go 16 at a time (numba_vector.py): other numbers of channels
are filled up with zeros, which scan to zeros. The states that are saved are those of the PyTorch backend (chunked.py),
so that a graph that torch.compile keeps on disk fits both.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from numba import config
from torch import Tensor

from . import numba_launch
from .chunked import CHUNK, states_shape
from .numba_forward import TILE
from .numba_launch import Call
from .numba_vector import LANES, LN2
from .paths import PATTERNS
from .reference import ALL_WANTED, Wanted, scan_type

# Fixed numbers, so that sums do not depend on threads. Blocks of channels are walked back together, which spares sums
# over lanes, unless there are fewer tasks than this.
BACKWARD_TASKS = 16
# Tokens of a partial sum of the projections' gradient, at least, and partial sums, at most.
WEIGHT_PIECE, WEIGHT_PIECES = 256, 64


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def obstacle() -> str | None:
    """Why the kernels cannot be compiled here, if they cannot."""
    return "NUMBA_DISABLE_JIT switches its compiler off" if config.DISABLE_JIT else None


def forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan `x` `[B, H, W, D]`: `(y [B, H, W, D], states)` in the scan's type; without `save` the states are empty."""
    B, H, W, D = x.shape
    dtype = scan_type(x)
    states = x.new_empty(states_shape(B, H, W, _up(D, LANES), A_logs.shape[1], pattern) if save else (0,), dtype=dtype)
    order = PATTERNS[pattern]
    y = x.new_empty((order.visits * B, H, W, _up(D, LANES)), dtype=dtype)
    if B:
        call = _prepare(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern, save)
        call.bind(y=y, states=states)
        call.run("forward", numba_launch.SCAN, B * len(order.groups) * y.shape[-1] // LANES)
    return _sum_of_visits(y, order.visits, D), states[..., :D].contiguous() if save else states


def backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor,
    Ds: Tensor, states: Tensor, pattern: str, wanted: Wanted = ALL_WANTED,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and the five parameters, each in its own type, from dy `[B, H, W, D]` and the saved states.

    Those that are not `wanted` are None; the products behind the scan are left out with them.
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if not x.shape[0]:
        return tuple(t.new_zeros(t.shape) if want else None for t, want in zip((x, *parameters), wanted, strict=True))
    B, H, W, D = x.shape
    if states.shape != (expected := states_shape(B, H, W, D, A_logs.shape[1], pattern)):
        raise ValueError(f"states must be {list(expected)}, got {list(states.shape)}")
    call = _prepare(x, *parameters, pattern, save=False)
    K, _, R = dt_projs_weight.shape
    N = A_logs.shape[1]
    Dp, Np, Lp, S = call["D"], call["Np"], call["Lp"], call["S"]
    slabs = max(1, min(Dp // LANES, BACKWARD_TASKS // (B * K)))
    piece = _up(max(WEIGHT_PIECE, -(-B * Lp // WEIGHT_PIECES)), TILE)
    pieces = -(-B * Lp // piece)
    call.set(slabs=slabs, piece=piece, pieces=pieces)
    visits = PATTERNS[pattern].visits
    dx = states.new_empty((visits * B, H, W, Dp))
    partial = states.new_empty((B, K, N + R + 2, Dp))
    weight_partial = states.new_empty((pieces, K, S, Dp))
    call.bind(
        x_proj_rows=call.tensors["x_proj"].mT.contiguous(),
        dy=_channels(dy, states.dtype, Dp),
        states=_channels(states, states.dtype, Dp),
        dx_scan=dx,
        dproj=states.new_empty((slabs, K, B, Lp, S)),
        partial=partial,
        weight_partial=weight_partial,
    )
    call.run("backward", numba_launch.SCAN_BACKWARD, B * K * slabs)
    gradients: list[Tensor | None] = [None] * len(wanted)
    sums = partial[0].numel()
    if wanted[0] or wanted[1]:  # it also adds up what the weight's gradient reads
        call.run("backward", numba_launch.INPUT_GRADIENT, K * B * Lp // TILE)
    if wanted[0]:
        gradients[0] = _sum_of_visits(dx, visits, D).to(x.dtype)
    if wanted[1]:
        call.run("backward", numba_launch.WEIGHT_GRADIENT, K * pieces)
        sums += weight_partial[0].numel()
    call.run("backward", numba_launch.SUM, sums // LANES)
    rows = weight_partial[0, ..., :D]
    d_A, d_dt_proj, d_bias, d_skip = partial[0, ..., :D].split([N, R, 1, 1], dim=1)
    if wanted[1]:
        d_x_proj = torch.cat([rows[:, 2 * Np : 2 * Np + R], rows[:, :N], rows[:, Np : Np + N]], dim=1)
        gradients[1] = _gradient(x_proj_weight, d_x_proj)
    values = (d_dt_proj.mT, d_bias, (d_A * call.tensors["A"][..., :D] * LN2).mT, d_skip)
    for i, value in enumerate(values, start=2):
        gradients[i] = _gradient(parameters[i - 1], value) if wanted[i] else None
    return tuple(gradients)


def _gradient(parameter: Tensor, values: Tensor) -> Tensor:
    # Contiguous and memory of its own: torch.compile relies on the first, custom operators have to return the second.
    values = values.reshape(parameter.shape)
    return values.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)


def _sum_of_visits(y: Tensor, visits: int, D: int) -> Tensor:
    # Where nothing is to be done y itself: a view could not be changed in place, and would keep all visits.
    if visits > 1:
        first, second, *others = y.view(visits, len(y) // visits, *y.shape[1:])
        y = first + second
        for other in others:
            y += other
    return y[..., :D].contiguous() if y.shape[-1] > D else y


def _prepare(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str, save: bool,
) -> Call:  # fmt: skip
    """Everything that the scan's kernels read, the projections included."""
    B, H, W, D = x.shape
    K, _, R = dt_projs_weight.shape
    N = A_logs.shape[1]
    Dp, Np, Rp = (_up(size, LANES) for size in (D, N, R))
    order = PATTERNS[pattern]
    L = order.length(H, W)
    Lp = _up(L, CHUNK)
    dtype = scan_type(x)

    paths, visit_of = _order(H, W, pattern)
    S = 2 * Np + Rp
    call = Call(
        B=B, HW=H * W, K=K, L=L, Lp=Lp, D=Dp, N=N, Np=Np, R=R, S=S, channels=D,
        visits=order.visits, save=save,
    )  # fmt: skip
    call.bind(
        paths=paths,
        visit_of=visit_of,
        x=_channels(x, dtype, Dp),
        x_proj_weight=x_proj_weight.to(x.dtype).to(dtype).contiguous(),
        dt_weight=dt_projs_weight.to(x.dtype).to(dtype).contiguous(),
        minus_A=A_logs.to(dtype).exp().contiguous(),
        x_proj=x.new_empty((K, Dp, S), dtype=dtype),
        dt_proj=x.new_empty((K, R, Dp), dtype=dtype),
        A=x.new_empty((K, N, Dp), dtype=dtype),
        bias=_channels(dt_projs_bias, dtype, Dp),
        skip=_channels(Ds.view(K, D), dtype, Dp),
        proj=x.new_empty((K, B, Lp, S), dtype=dtype),
    )
    call.run("forward", numba_launch.ARRANGE, K * Dp // LANES)
    call.run("forward", numba_launch.PROJECT, K * B * Lp // TILE)
    return call


def _channels(tensor: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """Contiguous, of a type, and with zeros up to a number of channels."""
    tensor, missing = tensor.to(dtype), channels - tensor.shape[-1]
    return (F.pad(tensor, (0, missing)) if missing else tensor).contiguous()  # padding by nothing is a copy


@lru_cache(maxsize=64)
def _order(H: int, W: int, pattern: str) -> tuple[Tensor, Tensor]:
    """Pixels of a group's tokens, -1 also up to a multiple of 16 tokens; which of a pixel's visits a group is."""
    order = PATTERNS[pattern]
    with torch.inference_mode(False):
        paths = order.paths(H, W)
        starts = [(group.row, group.column) for group in order.groups]
        visits = [starts[:k].count(start) for k, start in enumerate(starts)]
        return F.pad(paths, (0, -paths.shape[1] % CHUNK), value=-1), torch.tensor(visits, dtype=torch.int32)
