"""What a model costs: multiply-accumulates as the paper counts them, time and memory as they are measured here.

Works for every model whose operations PyTorch knows (ours, timm's, whole detectors), not for ours alone.
"""

import contextlib
import ctypes
import gc
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

import evmamba.kernels  # noqa: F401  (registers the scan and its FLOP formula)

MEBIBYTE = 2**20
# How often models that take turns have theirs.
ROUNDS = 5

# Multiply-accumulates per element of the input, which the paper's counter (fvcore) gives to these operations.
NORMS_AND_POOLS: dict[Callable[..., Any], tuple[str, int]] = {
    F.layer_norm: ("layer_norm", 5),
    F.group_norm: ("group_norm", 5),
    F.batch_norm: ("batch_norm", 2),
    F.adaptive_avg_pool2d: ("avg_pool", 1),
    F.avg_pool2d: ("avg_pool", 1),
}
NOT_PRODUCTS = frozenset(kind for kind, _ in NORMS_AND_POOLS.values())


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass.

    Attributes:
        paper: all that the paper counts.
        plain: convolutions, linear layers and matrix products only (with the scan's two projections, not the scan).
        by_op: the summands of `paper`, by kind of operation.
    """

    paper: int
    plain: int
    by_op: dict[str, int]


class Timing(TypedDict):
    """What `measure_inference` and `measure_training` return."""

    latency_ms_median: float
    latency_ms_p95: float
    images_per_s: float
    peak_memory_mb: float
    peak_memory_kind: str


@dataclass(frozen=True)
class Turns:
    """What `take_turns` says of one model.

    Attributes:
        timing: over all its timed steps.
        rounds: over those of each round.
    """

    timing: Timing
    rounds: list[Timing]


def count_parameters(model: nn.Module) -> int:
    """Number of elements of all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(
    model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224), *, inputs: tuple[Any, ...] | None = None
) -> Macs:
    """Count the multiply-accumulates of one forward pass in evaluation mode, by running it.

    Counted (EfficientVMamba, table 1, which follows fvcore): convolutions, linear layers and matrix products including
    attention, one per multiply-add, biases free; the scan, `9*L*D*N + L*D` for each of its groups, with its two
    projections; LayerNorm and GroupNorm 5 per element, BatchNorm 2, average pools 1 per input element. Not counted:
    activations, additions, gating products, plain means, resizing, data movement.

    Args:
        model: any module; it is left as it was.
        input_size: channels, height and width of the one image.
        inputs: arguments of `model.forward` in place of that image, e.g. `([image],)` for a torchvision detector.
            The work of a two-stage detector depends on how many regions it proposes for these.
    """
    tally: Counter[str] = Counter()
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_formulas(tally))
    with torch.no_grad(), _restored(model), sdpa_kernel(SDPBackend.MATH):
        model.eval()
        arguments = inputs if inputs is not None else (_images(1, input_size, _device(model)),)
        with _NormsAndPools(tally), counter:
            model(*arguments)
    if uncounted := counter.get_total_flops() // 2 - sum(n for kind, n in tally.items() if kind not in NOT_PRODUCTS):
        tally["other"] = uncounted  # an operation that only PyTorch's own registry knows
    by_op = dict(tally)
    return Macs(
        paper=sum(by_op.values()),
        plain=sum(count for name, count in by_op.items() if name not in NOT_PRODUCTS | {"scan"}),
        by_op=by_op,
    )


def measure_inference(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 1,
    *,
    inputs: tuple[Any, ...] | None = None,
    warmup: int = 10,
    steps: int = 40,
    device: str | torch.device | None = None,
    amp: torch.dtype | None = None,
) -> Timing:
    """Time forward passes in evaluation mode without gradients; every step is synchronised and timed on its own.

    Args:
        model: any module; it is left as it was.
        input_size: channels, height and width of the images.
        batch_size: number of images of a step.
        inputs: arguments of `model.forward` in place of such a batch; `batch_size` must still tell their number.
        warmup: steps before the clock starts.
        steps: timed steps.
        device: where to run; the model's own device by default.
        amp: run under autocast to this dtype.

    Returns:
        Milliseconds per step (median, 95th percentile), images per second (from the median) and the peak memory in MB
        (2^20 bytes): on CUDA what tensors took at most; on the CPU the process's peak resident memory above that at
        the start, so without the model itself. `peak_memory_kind` says which.
    """
    place = torch.device(device) if device is not None else _device(model)
    with ready_for_inference(model, input_size, batch_size, inputs=inputs, device=place, amp=amp) as step:
        return _measure(step, batch_size, warmup, steps, place)


def measure_training(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 32,
    *,
    inputs: tuple[Any, ...] | None = None,
    warmup: int = 10,
    steps: int = 40,
    device: str | torch.device | None = None,
    amp: torch.dtype | None = None,
) -> Timing:
    """Time training steps: forward, backward and an AdamW update with learning rate 0, which costs the same as any.

    The loss is the mean of the model's outputs (the sum over a list or dict of them). Arguments and result as in
    :func:`measure_inference`; parameters, gradients, buffers and random state are left as they were.
    """
    place = torch.device(device) if device is not None else _device(model)
    with ready_for_training(model, input_size, batch_size, inputs=inputs, device=place, amp=amp) as step:
        return _measure(step, batch_size, warmup, steps, place)


@contextlib.contextmanager
def ready_for_inference(
    model: nn.Module,
    input_size: tuple[int, int, int],
    batch_size: int,
    *,
    inputs: tuple[Any, ...] | None = None,
    device: str | torch.device,
    amp: torch.dtype | None = None,
) -> Iterator[Callable[[], None]]:
    """A forward pass to be timed, of a model that is put back afterwards; arguments as of :func:`measure_inference`."""
    with _restored(model):
        model.to(device).eval()
        arguments = inputs if inputs is not None else (_images(batch_size, input_size, torch.device(device)),)
        yield inference_step(model, arguments, amp)


@contextlib.contextmanager
def ready_for_training(
    model: nn.Module,
    input_size: tuple[int, int, int],
    batch_size: int,
    *,
    inputs: tuple[Any, ...] | None = None,
    device: str | torch.device,
    amp: torch.dtype | None = None,
) -> Iterator[Callable[[], None]]:
    """A training step to be timed, of a model that is put back afterwards; arguments as of :func:`measure_training`."""
    with _restored(model), torch.random.fork_rng():
        model.to(device).train()
        arguments = inputs if inputs is not None else (_images(batch_size, input_size, torch.device(device)),)
        step, _ = training_step(model, arguments, amp)
        yield step


def take_turns(
    ready: Sequence[Callable[[], AbstractContextManager[Callable[[], None]]]],
    batch_size: int,
    *,
    warmup: int,
    steps: int,
    device: str | torch.device,
) -> list[Turns | Exception]:
    """Time several models side by side: all are ready at once and take turns, so that what else a machine does falls on
    all of them alike.

    Args:
        ready: what gives each model's step, `ready_for_inference` or `ready_for_training` with their arguments; called
            twice, as the first step of all is only there to compile what it needs.
        batch_size: images of a step.
        warmup: steps of each model before the clock starts.
        steps: timed steps of each model, shared by `ROUNDS` rounds, or by one each if they are fewer.
        device: where they run.

    Returns:
        For each model what was measured, as :func:`measure_inference` does, or the error that ended it. The peak memory
        is that of the warm-up.
    """
    place = torch.device(device)
    results: list[Turns | Exception] = [RuntimeError("not measured")] * len(ready)
    taking: dict[int, tuple[Callable[[], None], int, str]] = {}
    seconds: dict[int, list[list[float]]] = {}
    with contextlib.ExitStack() as stack:
        for k, enter in enumerate(ready):
            try:
                with enter() as step:
                    step()
                before = _allocated(place)
                peak = watch_memory(place)
                step = stack.enter_context(enter())
                for _ in range(max(1, warmup)):
                    step()
                memory, kind = peak()
                taking[k], seconds[k] = (step, memory - before, kind), []
            except Exception as error:  # somebody's model may fail in any way
                results[k] = error
        rounds = min(ROUNDS, steps)
        for done in range(rounds):
            for k in list(taking):
                try:
                    step = taking[k][0]
                    if len(taking) > 1:
                        step()  # what the others left in the caches is theirs
                    seconds[k].append([timed(step, place) for _ in range(done, steps, rounds)])
                except Exception as error:  # those prepared after it may have left too little memory
                    results[k] = error
                    del taking[k]
        for k, (_, memory, kind) in taking.items():
            whole = _timing([s for turn in seconds[k] for s in turn], batch_size, memory, kind)
            results[k] = Turns(whole, [_timing(turn, batch_size, memory, kind) for turn in seconds[k]])
        taking.clear()
    return results


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def inference_step(
    model: Callable[..., Any], arguments: tuple[Any, ...], amp: torch.dtype | None = None
) -> Callable[[], None]:
    """A forward pass without gradients, under autocast to `amp` if that is given; modes are the caller's affair."""
    kind = _device_type(arguments)

    def step() -> None:
        with torch.no_grad(), torch.autocast(kind, amp, enabled=amp is not None):
            model(*arguments)

    return step


def training_step(
    model: nn.Module,
    arguments: tuple[Any, ...],
    amp: torch.dtype | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    capturable: bool = False,
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Forward, backward and an AdamW update with learning rate 0, and its optimizer.

    Args:
        model: whose parameters are trained; modes are the caller's affair.
        arguments: of the model.
        amp: type of autocast, if any.
        forward: what is called in place of the model, such as its compiled form.
        capturable: the optimizer can be captured in a CUDA graph.
    """
    kind = _device_type(arguments)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=0.0,
        weight_decay=0.0,
        capturable=capturable,
    )
    call = model if forward is None else forward

    def step() -> None:
        with torch.enable_grad():
            with torch.autocast(kind, amp, enabled=amp is not None):
                loss = torch.stack([output.float().mean() for output in _tensors(call(*arguments))]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return step, optimizer


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, begun and ended with the device idle."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


class _NormsAndPools(TorchFunctionMode):
    """Count norms and pools at the level of `torch.nn.functional`; below it a pool cannot be told from a mean."""

    def __init__(self, tally: Counter[str]) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in NORMS_AND_POOLS:
            name, per_element = NORMS_AND_POOLS[func]
            x = args[0] if args else kwargs["input"]
            self.tally[name] += per_element * x.numel()
        return func(*args, **kwargs)


def _formulas(tally: Counter[str]) -> dict[Any, Callable[..., int]]:
    """FLOP formulas for PyTorch's counter that also tally multiply-accumulates by kind of operation."""
    aten = torch.ops.aten

    def counted(kind: str, flops: int) -> int:
        tally[kind] += flops // 2
        return flops

    def convolution(x: Any, w: Any, _bias: Any, stride: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        transposed, groups = rest[2], rest[4]
        flops = flop_counter.conv_flop_count(x, w, out_shape, transposed=transposed)
        return counted(_kind_of_convolution(w, stride, groups), flops)

    def product(kind: str, first: int) -> Callable[..., int]:
        def formula(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
            return counted(kind, 2 * math.prod(out_shape) * shapes[first][-1])

        return formula

    formulas: dict[Any, Callable[..., int]] = {
        aten.convolution: convolution,
        aten._convolution: convolution,
        aten.mm: product("linear", 0),
        aten.addmm: product("linear", 1),
        aten._addmm_activation: product("linear", 1),
        aten.bmm: product("matmul", 0),
        aten.baddbmm: product("matmul", 1),
    }
    for op in (torch.ops.evmamba.scan2d, torch.ops.evmamba.scan2d_train):
        formulas[op] = _scan_formula(flop_counter.flop_registry[op], tally)

    def sequences(*tensors: Any, **options: Any) -> int:
        return counted("scan", flop_counter.flop_registry[torch.ops.evmamba.selective_scan](*tensors, **options))

    sequences._get_raw = True  # type: ignore[attr-defined]  # as in `_scan_formula`
    formulas |= dict.fromkeys((torch.ops.evmamba.selective_scan, torch.ops.evmamba.selective_scan_train), sequences)

    def fused_norm(shape: Any, *_: Any, **__: Any) -> int:
        tally["layer_norm"] += 5 * math.prod(shape)  # as if it were F.layer_norm, which runs where this operator cannot
        return 0  # PyTorch's counter, like the paper's plain count, has no norms

    def fused_squeeze(shape: Any, *shapes: Any, **_: Any) -> int:
        tally["layer_norm"] += 2 * 5 * math.prod(shape)
        weight = shapes[4]  # of two linear layers, for both branches of every image
        return counted("linear", 2 * 4 * shape[0] * math.prod(weight))

    def depthwise(shape: Any, *_: Any, **__: Any) -> int:
        return counted("conv_depthwise", 2 * 9 * math.prod(shape))

    formulas[torch.ops.evmamba.norm_gate] = formulas[torch.ops.evmamba.layer_norm] = fused_norm
    formulas[torch.ops.evmamba.depthwise_conv] = depthwise
    formulas[torch.ops.evmamba.squeeze_excite_add] = fused_squeeze
    return formulas


def _kind_of_convolution(weight: Sequence[int], stride: Sequence[int], groups: int) -> str:
    kernel = tuple(weight[2:])
    if groups > 1 and weight[1] == 1:
        return "conv_depthwise"
    if set(kernel) == {1}:
        return "conv_1x1"
    return "conv_patch" if kernel == tuple(stride) else "conv"


def _scan_formula(registered: Callable[..., int], tally: Counter[str]) -> Callable[..., int]:
    """Split what the scan's own formula counts in its two projections and the recurrence."""

    def formula(x: Any, x_proj_weight: Any, dt_projs_weight: Any, *rest: Any, **options: Any) -> int:
        flops = registered(x, x_proj_weight, dt_projs_weight, *rest, **options)
        _, inner, rank = dt_projs_weight.shape
        projected = x_proj_weight.shape[1]
        state = (projected - rank) // 2
        per_token = {"x_proj": projected * inner, "dt_proj": rank * inner, "scan": 9 * inner * state + inner}
        tokens = flops // 2 // sum(per_token.values())
        for kind, count in per_token.items():
            tally[kind] += tokens * count
        return flops

    formula._get_raw = True  # type: ignore[attr-defined]  # PyTorch's counter then passes tensors, not shapes
    return formula


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _device_type(arguments: Any) -> str:
    return next((leaf.device.type for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)), "cpu")


def _images(batch_size: int, input_size: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0)).to(device)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back modes, device, buffers and gradients of a model afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = _device(model)
    buffers = [(buffer, buffer.detach().cpu().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        model.to(device)
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _measure(step: Callable[[], None], batch_size: int, warmup: int, steps: int, device: torch.device) -> Timing:
    peak_memory = watch_memory(device)
    for _ in range(warmup):
        step()
    seconds = [timed(step, device) for _ in range(steps)]
    return _timing(seconds, batch_size, *peak_memory())


def _timing(seconds: Sequence[float], batch_size: int, peak: int, kind: str) -> Timing:
    median, p95 = np.percentile(seconds, [50, 95])
    return Timing(
        latency_ms_median=1e3 * float(median),
        latency_ms_p95=1e3 * float(p95),
        images_per_s=batch_size / float(median),
        peak_memory_mb=peak / MEBIBYTE,
        peak_memory_kind=kind,
    )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def watch_memory(device: torch.device) -> Callable[[], tuple[int, str]]:
    """Start watching; the returned function tells the peak since then in bytes, and of what.

    On CUDA all tensors count; on the CPU the process's resident memory above that at the start.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: (torch.cuda.max_memory_allocated(device), "CUDA tensors")
    _return_freed_memory()
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: set the peak (VmHWM) back to the present size
    except OSError:
        start = _peak_of_process()
        return lambda: (_peak_of_process() - start, "rise of the process's peak resident memory (ru_maxrss)")
    start = _status_bytes(status, "VmRSS")
    return lambda: (_status_bytes(status, "VmHWM") - start, "resident memory above the start (VmHWM)")


def _return_freed_memory() -> None:
    # What malloc kept of earlier work would otherwise be used again unseen.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def _peak_of_process() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
