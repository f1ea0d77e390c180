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
from .reference import ALL_WANTED, Wanted
from .triton_backward import scan_backward_kernel
from .triton_forward import carry_kernel, decay_kernel, scan_forward_kernel, segment_state_kernel
from .triton_math import BLOCK, CHECKPOINT, DTYPES, GROUP_TOKENS, LN2, on_device
from .triton_project import (
    gradient_width,
    input_gradient_kernel,
    paths_kernel,
    project_kernel,
    projection_width,
    weight_gradient_kernel,
)
from .tuning import Tuning, tuning_of

RANK_IN_REGISTERS = 16


@dataclass(frozen=True)
class Plan:
    """How a shape is cut into programs; depends on the shape and the device's tuning only, so that results repeat."""

    tokens: int  # tokens of a segment
    segments: int


def plan(B: int, D: int, L: int, K: int, tuning: Tuning) -> Plan:
    """The choice among the kernels by shape.

    Sequences that are long and few are cut into segments, in both directions: that costs each exponential twice in the
    forward, but fills the GPU. All others are scanned from end to end.
    """
    programs = B * K * ceil(D / BLOCK)
    tokens = L
    if 0 < programs < tuning.few_programs and tokens >= 2 * tuning.shortest_segment:
        tokens = max(tuning.shortest_segment, ceil(L * programs / (2 * tuning.few_programs)))
    tokens = ceil(tokens / CHECKPOINT) * CHECKPOINT
    return Plan(tokens, ceil(L / tokens))


def states_shape(B: int, H: int, W: int, D: int, N: int, pattern: str) -> tuple[int, ...]:
    """Shape of the float32 states that the forward saves: the state before every 16th token."""
    return len(PATTERNS[pattern].groups), B, (path_length(H, W, pattern) + CHECKPOINT - 1) // CHECKPOINT, N, D


def path_table(H: int, W: int, pattern: str, device: torch.device, length: int) -> Tensor:
    """`Pattern.paths` lengthened to int32 `[K + 1, length]` with -1, so that a kernel may read ahead.

    Computed in every call: memory that is kept would belong to one stream, or to the pool of one CUDA graph.
    """
    order = PATTERNS[pattern]
    groups = tuple(astuple(group) for group in order.groups)
    table = torch.empty(len(groups) + 1, length, dtype=torch.int32, device=device)
    paths_kernel[(triton.cdiv(length, 256), len(groups) + 1)](
        table=table, H=H, W=W, L=order.length(H, W), LP=length, GROUPS=groups, STEP=order.step, BT=256
    )
    return table


@dataclass(frozen=True)
class ScanArguments:
    """What all scan kernels take, by their names for it."""

    bc: Tensor  # int64: the projections, seen as pairs (B, C)
    dt_low: Tensor  # float32 [K * B * LP + GROUP_TOKENS, S]: the projections
    decay: Tensor  # [K, N, D]
    dt_weight: Tensor
    dt_bias: Tensor
    table: Tensor  # [K + 1, LP]
    B: int
    HW: int
    L: int
    LP: int
    segments: int
    tokens: int
    K: int
    D: int
    N: int
    R: int
    S: int
    DTYPE: tl.dtype
    NVIDIA: bool

    @property
    def programs(self) -> int:
        """One for each block of channels of a segment of a group of an image."""
        return self.B * self.segments * self.K * ceil(self.D / BLOCK)

    def forward_options(self) -> dict[str, Any]:
        """What the kernels of triton_forward.py with a state take besides."""
        return {"IN_REGISTERS": self.R <= RANK_IN_REGISTERS, "num_warps": 1}

    def backward_arguments(self) -> dict[str, Any]:
        """All that the backward takes of these: it reads B and C as floats, from `dt_low`."""
        return {name: value for name, value in vars(self).items() if name != "bc"} | self.forward_options()


@dataclass(frozen=True)
class ProductArguments:
    """What the matrix products of the projections and of their gradients take, by the kernels' names for it."""

    table: Tensor
    M: int  # tokens of a group, B * LP
    LP: int
    HW: int
    D: int
    N: int
    R: int
    S: int
    PRECISION: str


@dataclass(frozen=True)
class _Call:
    """What forward and backward of one call share."""

    x: Tensor
    x_proj_weight: Tensor
    skip: Tensor
    scan: ScanArguments
    product: ProductArguments
    visits: int

    @property
    def NC(self) -> int:
        """Saved states of a group."""
        return self.scan.LP // CHECKPOINT


def _prepare(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str, tuning: Tuning,
) -> _Call:  # fmt: skip
    """The scan order, the decay rates and the projections."""
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton scan takes float32, bfloat16 or float16, got {x.dtype}")
    B, H, W, D = x.shape
    K, N, R = len(PATTERNS[pattern].groups), A_logs.shape[1], dt_projs_weight.shape[2]
    L = path_length(H, W, pattern)
    LP = ceil(L / CHECKPOINT) * CHECKPOINT
    S = projection_width(N, R)
    x, x_proj_weight = x.contiguous(), x_proj_weight.contiguous()
    nvidia = x.is_cuda and torch.version.hip is None
    # Products of float32 keep its digits (three tf32 products are one of float32); gradients of half types get tf32's.
    precision = ("tf32x3" if x.dtype == torch.float32 else "tf32") if nvidia else "ieee"
    table = path_table(H, W, pattern, x.device, LP)
    decay = torch.empty(K, N, D, dtype=torch.float32, device=x.device)
    decay_kernel[(K, triton.cdiv(D, 64))](
        A_logs=A_logs.contiguous(), decay=decay, D=D, N=N, NP=triton.next_power_of_2(N), BD=64
    )
    proj = torch.empty(K * B * LP + GROUP_TOKENS, S, dtype=torch.float32, device=x.device)
    product = ProductArguments(table, B * LP, LP, H * W, D, N, R, S, precision)
    BS = _columns_of_a_tile(S)
    project_kernel[(triton.cdiv(product.M, 128), K, triton.cdiv(S, BS))](
        x=x, weight=x_proj_weight, proj=proj, **vars(product),
        BM=128, BS=BS, BK=64 if D % 64 == 0 and x.dtype != torch.float32 else 32,
        HALF_DOT=x.is_cuda and x.dtype != torch.float32,
    )  # fmt: skip
    cut = plan(B, D, L, K, tuning)
    scan = ScanArguments(
        proj.view(torch.int64), proj, decay, dt_projs_weight.contiguous(), dt_projs_bias.contiguous(), table,
        B, H * W, L, LP, cut.segments, cut.tokens, K, D, N, R, S, DTYPES[x.dtype], nvidia,
    )  # fmt: skip
    return _Call(x, x_proj_weight, Ds.contiguous(), scan, product, PATTERNS[pattern].visits)


def _columns_of_a_tile(S: int) -> int:
    return min(64, max(16, triton.next_power_of_2(S)))


def _channels_of_a_tile(D: int) -> int:
    return 64 if D > 32 else 32


def _segment_states(scan: ScanArguments, values: Tensor, reverse: bool) -> Tensor:
    """The state (or its gradient, from the other end) that each segment starts with: [K, B, segments, N, D]."""
    K, B, segments, D, N = scan.K, scan.B, scan.segments, scan.D, scan.N
    ends = torch.empty(K, B, segments, N, D, dtype=torch.float32, device=values.device)
    if segments == 1:
        return ends.zero_()
    sums = torch.empty(K, B, segments, D, dtype=torch.float32, device=values.device)
    segment_state_kernel[(scan.programs,)](
        values=values, ends=ends, sums=sums, REVERSE=reverse, **vars(scan), **scan.forward_options()
    )
    carry_kernel[(K * B, triton.cdiv(N * D, 128))](
        ends=ends, sums=sums, decay=scan.decay, B=B, segments=segments, D=D, N=N, BD=128, REVERSE=reverse
    )
    return ends


def forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str, save: bool, tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan `x` `[B, H, W, D]`: `(y float32 [B, H, W, D], states)`; without `save` the states are empty.

    `tuning` is the device's own if none is given.
    """
    B, H, W, D = x.shape
    states = x.new_empty(states_shape(B, H, W, D, A_logs.shape[1], pattern) if save else (0,), dtype=torch.float32)
    visits = PATTERNS[pattern].visits
    y = x.new_empty(visits, B, H, W, D, dtype=torch.float32)
    if y.numel() == 0:
        return y[0], states
    tuning = tuning or tuning_of(x.device)
    with on_device(x.device):
        call = _prepare(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern, tuning)
        scan = call.scan
        in_segments = scan.segments > 1
        starts = _segment_states(scan, call.x, reverse=False) if in_segments else scan.decay
        scan_forward_kernel[(scan.programs,)](
            x=call.x, skip=call.skip, starts=starts, y=y, states=states, NC=call.NC,
            SAVE=save, START=in_segments, PER_GROUP=visits > 1, **vars(scan), **scan.forward_options(),
        )  # fmt: skip
        return y[0] if visits == 1 else y.sum(0), states


def backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor,
    Ds: Tensor, states: Tensor, pattern: str, wanted: Wanted = ALL_WANTED, tuning: Tuning | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and the five parameters, each in its own type, from dy `[B, H, W, D]` and the saved states.

    Those that are not `wanted` are None; the products behind the scan are left out with them.
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    if x.numel() == 0:
        return tuple(t.new_zeros(t.shape) if want else None for t, want in zip((x, *parameters), wanted, strict=True))
    tuning = tuning or tuning_of(x.device)
    with on_device(x.device):
        call = _prepare(x, *parameters, pattern, tuning)
        scan = call.scan
        N, R = scan.N, scan.R
        dy = dy.contiguous()
        carry = _segment_states(scan, dy, reverse=True)
        dx_scan = x.new_empty(call.visits, *x.shape)
        # Sums over a block's channels each; bfloat16 has float32's range, float16 has not.
        dproj_type = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        blocks = ceil(scan.D / BLOCK)
        SG = gradient_width(N, R, dproj_type.itemsize)
        dproj = torch.empty(blocks, scan.K * call.product.M, SG, dtype=dproj_type, device=x.device)
        rows = 3 * N + R + 2
        partial = torch.empty(scan.K, scan.B * scan.segments, rows, scan.D, dtype=torch.float32, device=x.device)
        tensor_cores = tuning.tensor_cores
        if tensor_cores is None:
            tensor_cores = scan.NVIDIA and x.dtype == torch.bfloat16
        scan_backward_kernel[(scan.programs,)](
            x=call.x, skip=call.skip, dy=dy, states=states, carry=carry, dx=dx_scan, dproj=dproj, partial=partial,
            NC=call.NC, SG=SG, PER_GROUP=call.visits > 1, TENSOR=tensor_cores, **scan.backward_arguments(),
            **({"maxnreg": tuning.backward_registers} if scan.NVIDIA and tuning.backward_registers else {}),
        )  # fmt: skip
        gradients: list[Tensor | None] = [None] * len(wanted)
        if wanted[0]:
            gradients[0] = _input_gradient(call, dproj, dx_scan).to(x.dtype)
        if wanted[1]:
            d_x_proj = _weight_gradient(call, dproj, tuning.weight_gradient_splits)
            gradients[1] = d_x_proj.to(x_proj_weight.dtype)
        if any(wanted[2:]):
            sums = partial[:, :, 2 * N :].sum(1)  # [K, N + R + 2, D]
            values = (
                sums[:, N : N + R].transpose(1, 2),
                sums[:, N + R],
                (sums[:, :N] * scan.decay).mul_(LN2.value).transpose(1, 2),
                sums[:, N + R + 1],
            )
            for i, value in enumerate(values, start=2):
                gradients[i] = _gradient_of(parameters[i - 1], value) if wanted[i] else None
        return tuple(gradients)


def _gradient_of(parameter: Tensor, values: Tensor) -> Tensor:
    # Contiguous and memory of its own: torch.compile relies on the first, custom operators have to return the second.
    values = values.reshape(parameter.shape)
    return values.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)


def _input_gradient(call: _Call, dproj: Tensor, dx_scan: Tensor) -> Tensor:
    product, K = call.product, call.scan.K
    dx = torch.empty_like(dx_scan)
    BD = _channels_of_a_tile(product.D)
    input_gradient_kernel[(triton.cdiv(product.M, 64), K, triton.cdiv(product.D, BD))](
        dproj=dproj, weight=call.x_proj_weight, dx_scan=dx_scan, dx=dx, K=K, NB=dproj.shape[0], SG=dproj.shape[2],
        BM=64, BS=_columns_of_a_tile(product.S), BD=BD, PER_GROUP=call.visits > 1, DTYPE=call.scan.DTYPE, num_stages=1,
        **vars(product),
    )  # fmt: skip
    return dx[0] if call.visits == 1 else dx.sum(0)


def _weight_gradient(call: _Call, dproj: Tensor, most_splits: int) -> Tensor:
    product, K = call.product, call.scan.K
    tokens = max(64, ceil(product.M / most_splits / 64) * 64)
    splits = ceil(product.M / tokens)
    partial = torch.empty(splits, K, product.R + 2 * product.N, product.D, dtype=torch.float32, device=dproj.device)
    BS, BD = _columns_of_a_tile(product.S), _channels_of_a_tile(product.D)
    NS = triton.cdiv(product.S, BS)
    weight_gradient_kernel[(splits, K, NS * triton.cdiv(product.D, BD))](
        dproj=dproj, x=call.x, partial=partial, tokens=tokens, K=K, NB=dproj.shape[0], SG=dproj.shape[2],
        BM=64, BS=BS, BD=BD, NS=NS, num_stages=2, **vars(product),
    )  # fmt: skip
    return partial.sum(0)
