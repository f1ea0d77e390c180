"""Public scans over a map as custom operators: autograd, torch.compile, torch.export and FLOP counting see one op.

No mathematics here: `reference.py` defines it, and the backends (`chunked.py`, `numba_es2d.py`, `triton_es2d.py`) offer
`forward(x, *parameters, pattern, save) -> (y, states)`, `states_shape(B, H, W, D, N, pattern)` and
`backward(dy, x, *parameters, states, pattern, wanted) -> gradients`, None for those that are not wanted. The
parameters, in order and stacked over K = 4 groups, with step rank R and state size N: x_proj_weight `[K, R + 2N, D]`,
dt_projs_weight `[K, D, R]`, dt_projs_bias `[K, D]`, A_logs `[K D, N]`, Ds `[K D]`.
"""

import importlib
import logging
import os
import shutil
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import chunked, portable, reference
from .dry_run import is_dry_run
from .paths import PATTERNS, es2d_pattern, fold_step, path_length, pattern_named, unfold_step

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "torch", "numba", "triton")
# Of the operators: loaded from elsewhere (a kernel repository of the hub) the files must not take the package's place.
NAMESPACE = "evmamba" if __package__ == "evmamba.kernels" else f"evmamba_{__package__}"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def es2d_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    step: int = 2,
) -> Tensor:
    """Efficient 2D scanning: four atrous groups of the map, each scanned once (arXiv 2403.09977, section 4.1, eq. 5).

    x `[B, H, W, D]` float32, float64, bfloat16 or float16, any strides, any H and W; parameters as in the module's
    docstring, of any floating type. The projections take x's type; the scan runs in float32 (float64 for float64 x),
    and that is the type of the result `[B, H, W, D]`, before normalisation and gate. Differentiable once.

    step is the atrous step p; what other steps than the published networks' 2 mean: `paths.es2d_pattern`. Step 1 has
    parameters for K = 1, all others for K = 4.
    Raises ValueError for shapes, types or devices that do not fit together and for a step that is odd above 1.
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    pattern = es2d_pattern(step)
    if pattern.step == PATTERNS[pattern.name].step:
        return _scan(x, parameters, pattern.name)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, W, D], got {list(x.shape)}")
    y = _scan(fold_step(x, step), parameters, pattern.name)
    return unfold_step(y, step, x.shape[1], x.shape[2])


def ss2d_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
) -> Tensor:
    """VMamba's scan: rows, columns and both reversed over the full map, the four results summed (arXiv 2401.10166).

    Shapes, types and errors as `es2d_scan`.
    """
    return pattern_scan(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, "ss2d")


def pattern_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> Tensor:
    """The scan of a map in any of the orders of `paths.PATTERNS`, with as many sets of parameters as that has groups.

    Shapes, types and errors as `es2d_scan`; ValueError for an unknown pattern.
    """
    return _scan(x, (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds), pattern)


def selective_scan_1d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    reverse: bool = False,
) -> Tensor:
    """Plain selective scan of sequences, first token to last or in `reverse` (Mamba; both for Vim, arXiv 2401.09417).

    x `[B, L, D]` and result as in `es2d_scan`; x_proj_weight `[R + 2N, D]`, dt_proj_weight `[D, R]`, dt_proj_bias
    `[D]`, A_log `[D, N]`, D_skip `[D]`. Raises ValueError for shapes, types or devices that do not fit together.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, L, D], got {list(x.shape)}")
    parameters = (x_proj_weight[None], dt_proj_weight[None], dt_proj_bias[None], A_log, D_skip)
    return _scan(x[:, None], parameters, "reverse" if reverse else "forward")[:, 0]


def scan_macs(B: int, H: int, W: int, D: int, N: int, R: int, pattern: str) -> tuple[int, int]:
    """Multiply-adds of one call: (both projections, the scan as the paper counts it), padding tokens included."""
    tokens = len(PATTERNS[pattern].groups) * B * path_length(H, W, pattern)
    return tokens * D * (R + 2 * N) + tokens * D * R, 9 * tokens * D * N + tokens * D


def backend_name(device_type: str, dtype: torch.dtype) -> str:
    """Which backend scans tensors of this device and type: the one EVMAMBA_BACKEND names, else the fastest there is.

    Raises ValueError if EVMAMBA_BACKEND names none, or one that cannot do it.
    """
    if is_dry_run():
        return "triton"
    forced = os.environ.get("EVMAMBA_BACKEND", "")
    if forced not in ("", *BACKENDS):
        raise ValueError(f"EVMAMBA_BACKEND is {forced!r}, expected one of {', '.join(BACKENDS)}")
    best = forced or _FASTEST.get(device_type, "torch")
    obstacle = None
    if best == "triton":
        obstacle = _triton_obstacle(device_type, dtype)
    elif best == "numba":
        obstacle = _numba_obstacle(device_type)
    if forced and obstacle:
        raise ValueError(f"EVMAMBA_BACKEND={forced} cannot be followed: {obstacle}")
    name = "torch" if obstacle else best
    _log_once(name, device_type, dtype, obstacle)
    return name


def has_kernels(x: Tensor, channels: int = 0) -> bool:
    """Whether there are kernels for what is around a scan of tensors like x too.

    Triton's backend has them for all that it takes, the compiled CPU backend for inference (`has_cpu_kernels`).
    """
    return kernel_backend(x, channels) is not None


def kernel_backend(x: Tensor, channels: int = 0) -> str | None:
    """Whose kernels `has_kernels` means, "triton" or "numba"; None where it says no."""
    name = _constant_backend_name(x.device.type, x.dtype)
    return name if name == "triton" or (name == "numba" and _suits_cpu_kernels(x, channels)) else None


def has_cpu_kernels(x: Tensor, channels: int = 0) -> bool:
    """Whether those are the compiled CPU backend's: float32 without gradients, and only for `channels` that are a
    multiple of 16. Who traces or counts PyTorch's operators gets those."""
    return _suits_cpu_kernels(x, channels) and _constant_backend_name("cpu", x.dtype) == "numba"


def _suits_cpu_kernels(x: Tensor, channels: int) -> bool:
    return not torch.is_grad_enabled() and is_plain_float32(x) and channels % _numba_lanes() == 0


def is_plain_float32(x: Tensor) -> bool:
    """Whether operators on x run one by one on a CPU in float32: nobody traces, transforms, counts or exports them, nor
    computes tangents."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()
        and not portable.is_portable()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor | None) -> bool:
    """Whether this is none, or numbers that lie in a CPU's memory as they are, and no other kind of tensor."""
    if tensor is None:
        return True
    here = type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout == torch.strided
    return here and not tensor.is_neg() and not tensor._is_zerotensor()


def cpu_kernels(x: Tensor, channels: int, *others: Tensor | None) -> Any:
    """The module of the CPU's kernels around a scan, to be called without an operator in between. None where that
    cannot be: x does not have them (`has_cpu_kernels`), others are no plain tensors, or a profiler or a mode
    that sees PyTorch's functions watches.

    The operators are for who traces, differentiates or counts. Each costs more time than its kernel on a small map.
    """
    direct = has_cpu_kernels(x, channels) and _is_unobserved(x, *others)
    return _around_module() if direct else None


def _is_unobserved(*tensors: Tensor | None) -> bool:
    watched = torch.autograd._profiler_enabled() or torch._C._len_torch_function_stack()
    return not watched and all(is_plain(t) for t in tensors)


@torch.compiler.assume_constant_result
def _constant_backend_name(device_type: str, dtype: torch.dtype) -> str:
    return backend_name(device_type, dtype)


@lru_cache(maxsize=1)
def _numba_lanes() -> int:
    return importlib.import_module(".numba_vector", __package__).LANES


def numba_around(x: Tensor) -> Any:
    """Inside an operator: the module of the CPU's kernels around a scan, None where x `[..., C]` is for Triton's.

    The CPU's write whole vectors: an operator called by itself with other channels must not reach them.
    """
    fits = x.dtype == torch.float32 and x.shape[-1] % _numba_lanes() == 0
    return _around_module() if fits and backend_name(x.device.type, x.dtype) == "numba" else None


@lru_cache(maxsize=1)
def _around_module() -> ModuleType:
    return importlib.import_module(".numba_around", __package__)


_FASTEST = {"cuda": "triton", "cpu": "numba"}


def _numba_obstacle(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"numba compiles for CPU tensors, this one is on {device_type}"
    module = _numba_backend()
    return module.obstacle() if isinstance(module, ModuleType) else module


@lru_cache(maxsize=1)
def _numba_backend() -> ModuleType | str:
    try:
        return importlib.import_module(".numba_es2d", __package__)
    except ImportError as error:
        return f"numba cannot be imported ({error}; pip install 'evmamba[cpu]')"


def _triton_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "the Triton kernels do not compute in float64"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton runs on CUDA tensors, this one is on {device_type} (TRITON_INTERPRET=1 would interpret it)"
    module = _triton_backend()
    if not isinstance(module, ModuleType):
        return module
    return _machine_obstacle() if device_type == "cuda" else None


@lru_cache(maxsize=1)
def _machine_obstacle() -> str | None:
    # Known before the first launch, which would fail in the middle of a training.
    if torch.cuda.is_available() and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "it needs a C compiler to start kernels, and there is neither gcc nor clang"
    return None


@lru_cache(maxsize=1)
def _triton_backend() -> ModuleType | str:
    try:
        return importlib.import_module(".triton_es2d", __package__)
    except ImportError as error:
        return f"it cannot be imported ({error})"


@lru_cache
def _log_once(name: str, device_type: str, dtype: torch.dtype, reason: str | None) -> None:
    logger.info("scan backend for %s on %s: %s%s", dtype, device_type, name, f", because {reason}" if reason else "")


def _backend(x: Tensor) -> Any:
    backends = {"triton": _triton_backend, "numba": _numba_backend}
    return backends.get(backend_name(x.device.type, x.dtype), lambda: chunked)()


@torch.compiler.assume_constant_result
def _definition_is_forced() -> bool:
    return os.environ.get("EVMAMBA_BACKEND") == "reference"


def _scan(x: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], pattern: str) -> Tensor:
    check_inputs(x, *parameters, K=pattern_named(pattern).sets)
    if portable.is_portable():
        return portable.scan(x, *parameters, pattern)
    if _definition_is_forced():
        with torch.autocast(x.device.type, enabled=False):
            return reference.scan(x, *parameters, pattern)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        return scan2d_train(x, *parameters, pattern)[0]
    if is_plain_float32(x) and _is_unobserved(x, *parameters):
        return _backend(x).forward(x, *parameters, pattern, save=False)[0]  # without an operator: see `cpu_kernels`
    return scan2d(x, *parameters, pattern)


def check_inputs(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    K: int,
) -> None:
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must be [B, H, W, D] with at least one row, column and channel, got {list(x.shape)}")
    if dt_projs_weight.dim() != 3 or A_logs.dim() != 2:
        raise ValueError(
            f"dt_projs_weight must be [{K}, D, R] and A_logs [{K * x.shape[3]}, N], "
            f"got {list(dt_projs_weight.shape)} and {list(A_logs.shape)}"
        )
    D, R, N = x.shape[3], dt_projs_weight.shape[2], A_logs.shape[1]
    expected = {
        "x_proj_weight": (x_proj_weight, (K, R + 2 * N, D)),
        "dt_projs_weight": (dt_projs_weight, (K, D, R)),
        "dt_projs_bias": (dt_projs_bias, (K, D)),
        "A_logs": (A_logs, (K * D, N)),
        "Ds": (Ds, (K * D,)),
    }
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for x with D = {D} channels, R = {R}, N = {N}, got {list(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


@torch.library.custom_op(f"{NAMESPACE}::scan2d", mutates_args=())
def scan2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> Tensor:
    """Scan for inference: saves nothing, has no gradient."""
    with torch.autocast(x.device.type, enabled=False):
        y, _ = _backend(x).forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern, save=False)
    return y


@torch.library.custom_op(f"{NAMESPACE}::scan2d_train", mutates_args=())
def scan2d_train(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    pattern: str,
) -> tuple[Tensor, Tensor]:
    """Scan for training: the map and the states that the backward starts from (their layout is the backend's own)."""
    with torch.autocast(x.device.type, enabled=False):
        return _backend(x).forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern, save=True)


@torch.library.custom_op(f"{NAMESPACE}::scan2d_backward", mutates_args=())
def scan2d_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A_logs: Tensor,
    Ds: Tensor,
    states: Tensor,
    pattern: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the five parameters, each in its own type; empty where not `wanted`."""
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    with torch.autocast(x.device.type, enabled=False):
        gradients = _backend(x).backward(dy, *inputs, states, pattern, wanted)
    return tuple(t.new_empty(0) if g is None else g for t, g in zip(inputs, gradients, strict=True))  # type: ignore[return-value]


@scan2d.register_fake
def _(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern):
    return x.new_empty(x.shape, dtype=reference.scan_type(x))


@scan2d_train.register_fake
def _(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, pattern):
    dtype = reference.scan_type(x)
    shape = _backend(x).states_shape(*x.shape, A_logs.shape[1], pattern)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@scan2d_backward.register_fake
def _(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds, states, pattern, wanted):
    inputs = (x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(inputs, wanted, strict=True))


def save_scan_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Of an operator of tensors and a pattern that returns a map and the states for its backward."""
    *tensors, ctx.pattern = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple:
    if dy is None:
        return (None,) * 7
    wanted = list(ctx.needs_input_grad[:6])
    gradients = scan2d_backward(dy, *ctx.saved_tensors, ctx.pattern, wanted)
    return *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)), None


def no_double_backward(ctx: Any, *gradients: Tensor) -> tuple:
    raise NotImplementedError("the scan can be differentiated once only; its gradient has no gradient")


scan2d_train.register_autograd(_backward, setup_context=save_scan_for_backward)
scan2d_backward.register_autograd(no_double_backward)


def _flops(x_shape, x_proj_shape, dt_shape, bias_shape, A_shape, D_shape, pattern, *, out_shape=None) -> int:
    B, H, W, D = x_shape
    return 2 * sum(scan_macs(B, H, W, D, A_shape[1], dt_shape[2], pattern))


def _backward_flops(
    dy_shape,
    x_shape,
    x_proj_shape,
    dt_shape,
    bias_shape,
    A_shape,
    D_shape,
    states_shape,
    pattern,
    wanted,
    *,
    out_shape=None,
) -> int:
    # As for matrix products: the gradient of each operand costs what the forward does.
    return 2 * _flops(x_shape, x_proj_shape, dt_shape, bias_shape, A_shape, D_shape, pattern)


_ops = getattr(torch.ops, NAMESPACE)
register_flop_formula([_ops.scan2d, _ops.scan2d_train])(_flops)
register_flop_formula(_ops.scan2d_backward)(_backward_flops)
