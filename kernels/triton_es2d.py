"""The Triton backend of the 2-D scans: which kernels run for a shape, their launches, and what they hand over.

The kernels: triton_project.py (input projections in scan order), triton_forward.py, triton_backward.py. State and sums
are float32; inputs float32, bfloat16 or float16. Runs on CUDA tensors, or on CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1 in the environment before triton is imported).
"""

from dataclasses import astuple, dataclass
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paths import PATTERNS, path_length
from .triton_backward import scan_backward_kernel
from .triton_forward import carry_kernel, decay_kernel, scan_forward_kernel, segment_state_kernel
from .triton_math import BLOCK, CHECKPOINT, LN2, on_device
from .triton_project import (
    input_gradient_kernel,
    paths_kernel,
    project_kernel,
    projection_width,
    weight_gradient_kernel,
)

# Programs below which a GPU is far from full: scanning in segments then pays for twice the exponentials.
FEW_PROGRAMS = 1000
SHORTEST_SEGMENT = 64
RANK_IN_REGISTERS = 16
# Three backward warps a scheduler instead of two are worth a few spilled values.
BACKWARD_OPTIONS = {"maxnreg": 168}
WEIGHT_GRADIENT_SPLITS = 64


@dataclass(frozen=True)
class Plan:
    """How a shape is cut into programs; depends on nothing but the shape, so that results repeat."""

    tokens: int  # tokens of a segment
    segments: int


def plan(B: int, D: int, L: int, K: int) -> Plan:
    """The choice among the kernels by shape.

    Sequences that are long and few are cut into segments, in both directions: that costs each exponential twice in the
    forward, but fills the GPU. All others are scanned from end to end.
    """
    programs = B * K * ceil(D / BLOCK)
    tokens = L
    if 0 < programs < FEW_PROGRAMS and L >= 2 * SHORTEST_SEGMENT:
        tokens = max(SHORTEST_SEGMENT, ceil(L * programs / (2 * FEW_PROGRAMS)))
    tokens = ceil(tokens / CHECKPOINT) * CHECKPOINT
    return Plan(tokens, ceil(L / tokens))


def states_shape(B: int, H: int, W: int, D: int, N: int, pattern: str) -> tuple[int, ...]:
    """Shape of the float32 states that the forward saves: the state before every 16th token."""
    return len(PATTERNS[pattern].groups), B, (path_length(H, W, pattern) + CHECKPOINT - 1) // CHECKPOINT, N, D


def path_table(H: int, W: int, pattern: str, device: torch.device, length: int) -> Tensor:
    """`paths.scan_paths` lengthened to int32 `[K + 1, length]` with -1, so that a kernel may read ahead.

    Computed in every call: memory that is kept would belong to one stream, or to the pool of one CUDA graph.
    """
    order = PATTERNS[pattern]
    groups = tuple(astuple(group) for group in order.groups)
    table = torch.empty(len(groups) + 1, length, dtype=torch.int32, device=device)
    paths_kernel[(len(groups) + 1, triton.cdiv(length, 256))](
        table, H, W, order.length(H, W), length, GROUPS=groups, STEP=order.step, BT=256
    )
    return table


@dataclass(frozen=True)
class _Call:
    """What forward and backward of one call share: sizes, the scan order, the projections and the decay rates."""

    x: Tensor
    x_proj_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    skip: Tensor
    table: Tensor  # [K + 1, Lp]
    decay: Tensor  # [K, N, D]
    proj: Tensor  # [K * B * Lp + 1, S]
    sizes: dict[str, int]  # constexpr sizes K, D, N, R, S
    plan: Plan
    B: int
    HW: int
    L: int
    Lp: int
    NC: int
    nvidia: bool
    precision: str

    @property
    def tokens_of_group(self) -> int:
        return self.B * self.Lp

    def scan_arguments(self) -> tuple[Tensor, ...]:
        """(bc, dt_low, decay, dt_weight, dt_bias) as every scan kernel takes them."""
        return self.proj.view(torch.int64), self.proj, self.decay, self.dt_weight, self.dt_bias

    @property
    def dtype(self) -> tl.dtype:
        return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[self.x.dtype]

    @property
    def tensor_cores(self) -> bool:
        """Whether NVIDIA's tensor cores add up over channels: they cut to 10 bits, bfloat16 has 7, the others more."""
        return self.nvidia and self.x.dtype == torch.bfloat16

    def state_options(self) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.sizes)
        N, R = self.sizes["N"], self.sizes["R"]
        options.update(NP=triton.next_power_of_2(N), BD=BLOCK, IN_REGISTERS=R <= RANK_IN_REGISTERS)
        options.update(NVIDIA=self.nvidia, DTYPE=self.dtype, num_warps=1 if N <= 32 else 4)
        return options


def _prepare(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str,
) -> _Call:  # fmt: skip
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the Triton scan takes float32, bfloat16 or float16, got {x.dtype}")
    B, H, W, D = x.shape
    K, N, R = len(PATTERNS[pattern].groups), A_logs.shape[1], dt_projs_weight.shape[2]
    L = path_length(H, W, pattern)
    Lp = ceil(L / CHECKPOINT) * CHECKPOINT
    S = projection_width(N, R)
    x, x_proj_weight = x.contiguous(), x_proj_weight.contiguous()
    nvidia = x.is_cuda and torch.version.hip is None
    # Products of float32 keep its digits (three tf32 products are one of float32); gradients of half types get tf32's.
    precision = ("tf32x3" if x.dtype == torch.float32 else "tf32") if nvidia else "ieee"
    table = path_table(H, W, pattern, x.device, Lp)
    decay = torch.empty(K, N, D, dtype=torch.float32, device=x.device)
    A_logs = A_logs.contiguous()
    NP = triton.next_power_of_2(N)
    decay_kernel[(K, triton.cdiv(D, 64))](A_logs, decay, D=D, N=N, NP=NP, BD=64)
    M = B * Lp
    proj = torch.empty(K * M + 1, S, dtype=torch.float32, device=x.device)
    BS = min(64, max(16, triton.next_power_of_2(S)))
    project_kernel[(triton.cdiv(M, 128), K, triton.cdiv(S, BS))](
        x, x_proj_weight, table, proj, M, Lp, H * W,
        D=D, N=N, R=R, S=S, BM=128, BS=BS, BK=64 if D % 64 == 0 and x.dtype != torch.float32 else 32,
        HALF_DOT=x.is_cuda and x.dtype != torch.float32, PRECISION=precision,
    )  # fmt: skip
    return _Call(
        x, x_proj_weight, dt_projs_weight.contiguous(), dt_projs_bias.contiguous(), Ds.contiguous(), table, decay, proj,
        {"K": K, "D": D, "N": N, "R": R, "S": S},
        plan(B, D, L, K), B, H * W, L, Lp, ceil(L / CHECKPOINT), nvidia, precision,
    )  # fmt: skip


def _segment_states(call: _Call, values: Tensor, reverse: bool) -> Tensor:
    """The state (or its gradient, from the other end) that each segment starts with: [K, B, segments, N, D]."""
    K, D, N = call.sizes["K"], call.sizes["D"], call.sizes["N"]
    B, cut = call.B, call.plan
    ends = torch.empty(K, B, cut.segments, N, D, dtype=torch.float32, device=values.device)
    if cut.segments == 1:
        return ends.zero_()
    sums = torch.empty(K, B, cut.segments, D, dtype=torch.float32, device=values.device)
    segment_state_kernel[(B * cut.segments * K * ceil(D / BLOCK),)](
        values, *call.scan_arguments(), call.table, ends, sums,
        B, call.HW, call.L, call.Lp, cut.segments, cut.tokens, REVERSE=reverse, **call.state_options(),
    )  # fmt: skip
    carry_kernel[(K * B, triton.cdiv(N * D, 128))](
        ends, sums, call.decay, B, cut.segments, D=D, N=N, BD=128, REVERSE=reverse
    )
    return ends


def forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan `x` `[B, H, W, D]`: `(y float32 [B, H, W, D], states)`; without `save` the states are empty."""
    B, H, W, D = x.shape
    states = x.new_empty(states_shape(B, H, W, D, A_logs.shape[1], pattern) if save else (0,), dtype=torch.float32)
    visits = PATTERNS[pattern].visits
    y = x.new_empty(visits, B, H, W, D, dtype=torch.float32)
    if y.numel() == 0:
        return y[0], states
    with on_device(x.device):
        call = _prepare(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern)
        cut = call.plan
        starts = _segment_states(call, call.x, reverse=False) if cut.segments > 1 else call.decay
        scan_forward_kernel[(B * cut.segments * call.sizes["K"] * ceil(D / BLOCK),)](
            call.x, *call.scan_arguments(), call.skip, call.table, starts, y, states,
            B, call.HW, call.L, call.Lp, call.NC, cut.segments, cut.tokens,
            SAVE=save, START=cut.segments > 1, PER_GROUP=visits > 1, **call.state_options(),
        )  # fmt: skip
        return y[0] if visits == 1 else y.sum(0), states


def backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor,
    Ds: Tensor, states: Tensor, pattern: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and the five parameters, each in its own type, from dy `[B, H, W, D]` and the saved states."""
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if x.numel() == 0:
        zeros = [p.new_zeros(p.shape) for p in parameters]
        return x.new_zeros(x.shape), zeros[0], zeros[1], zeros[2], zeros[3], zeros[4]
    with on_device(x.device):
        call = _prepare(x, *parameters, pattern)
        K, D, N, R, S = (call.sizes[name] for name in "KDNRS")
        B, cut, M, visits = call.B, call.plan, call.tokens_of_group, PATTERNS[pattern].visits
        dy = dy.contiguous()
        carry = _segment_states(call, dy, reverse=True)
        blocks = ceil(D / BLOCK)
        dx_scan = x.new_empty(visits, *x.shape)
        # Sums over 32 channels each; bfloat16 has float32's range, float16 has not.
        dproj_type = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        dproj = torch.empty(blocks, K * M, S, dtype=dproj_type, device=x.device)
        partial = torch.empty(K, B * cut.segments, N + R + 2, D, dtype=torch.float32, device=x.device)
        scan_backward_kernel[(B * cut.segments * K * blocks,)](
            call.x, *call.scan_arguments(), call.skip, call.table, dy, states, carry, dx_scan, dproj, partial,
            B, call.HW, call.L, call.Lp, call.NC, cut.segments, cut.tokens,
            PER_GROUP=visits > 1, DTYPE=call.dtype, NVIDIA=call.nvidia, TENSOR=call.tensor_cores, num_warps=1,
            **call.sizes,
            **(BACKWARD_OPTIONS if call.nvidia else {}),
        )  # fmt: skip
        dx = _input_gradient(call, dproj, dx_scan, visits)
        d_x_proj = _weight_gradient(call, dproj)
        sums = partial.sum(1)  # [K, N + R + 2, D]
        d_A_logs = (sums[:, :N] * call.decay).mul_(LN2.value).transpose(1, 2)
        return (
            dx.to(x.dtype),
            d_x_proj.to(x_proj_weight.dtype),
            _gradient_of(dt_projs_weight, sums[:, N : N + R].transpose(1, 2)),
            _gradient_of(dt_projs_bias, sums[:, N + R]),
            _gradient_of(A_logs, d_A_logs),
            _gradient_of(Ds, sums[:, N + R + 1]),
        )


def _gradient_of(parameter: Tensor, values: Tensor) -> Tensor:
    # Contiguous and memory of its own: torch.compile relies on the first, custom operators have to return the second.
    values = values.reshape(parameter.shape)
    return values.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)


def _input_gradient(call: _Call, dproj: Tensor, dx_scan: Tensor, visits: int) -> Tensor:
    D, S = call.sizes["D"], call.sizes["S"]
    dx = torch.empty_like(dx_scan)
    BS = min(64, max(16, triton.next_power_of_2(S)))
    BD = 64 if D > 32 else 32
    input_gradient_kernel[(triton.cdiv(call.tokens_of_group, 64), call.sizes["K"], triton.cdiv(D, BD))](
        dproj, call.x_proj_weight, call.table, dx_scan, dx, call.tokens_of_group, call.Lp, call.HW,
        BM=64, BS=BS, BD=BD, PER_GROUP=visits > 1, PRECISION=call.precision, num_stages=1,
        NB=dproj.shape[0], **call.sizes,
    )  # fmt: skip
    return dx[0] if visits == 1 else dx.sum(0)


def _weight_gradient(call: _Call, dproj: Tensor) -> Tensor:
    K, D, N, R, S = (call.sizes[name] for name in "KDNRS")
    M = call.tokens_of_group
    tokens = max(64, ceil(M / WEIGHT_GRADIENT_SPLITS / 64) * 64)
    splits = ceil(M / tokens)
    partial = torch.empty(splits, K, R + 2 * N, D, dtype=torch.float32, device=dproj.device)
    BS = min(64, max(16, triton.next_power_of_2(S)))
    BD = 64 if D > 32 else 32
    NS = triton.cdiv(S, BS)
    weight_gradient_kernel[(splits, K, NS * triton.cdiv(D, BD))](
        dproj, call.x, call.table, partial, M, call.Lp, call.HW, tokens,
        NB=dproj.shape[0], BM=64, BS=BS, BD=BD, NS=NS, PRECISION=call.precision, num_stages=2,
        **call.sizes,
    )  # fmt: skip
    return partial.sum(0)
