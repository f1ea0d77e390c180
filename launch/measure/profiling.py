"""Whole networks measured side by side: latency, throughput, memory and energy, of inference and of training steps.

At every resolution, batch size and phase all backbones, in all modes, precisions and layouts, are ready at once and
take turns for a few rounds, so that a machine's moods fall on all of them alike; the ratio to the first of them is the
median of the rounds' ratios. What cannot run leaves a row with its reason.
"""

import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib
import itertools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.optimization import fuse as fuse_conv_bn

from evmamba.blocks import ConvBranch, InvertedResidual
from evmamba.cost import MEBIBYTE, ROUNDS, inference_step, timed, training_step, watch_memory
from evmamba.errors import UserError, unknown_name
from evmamba.fusion import fuse
from evmamba.launch.store.precision import MEASURED, autocast_to
from evmamba.launch.store.results import device_name, git_state, versions
from evmamba.tasks.backbones import build_backbone

MODES = ("eager", "fused", "compiled", "graph")
PHASES = ("inference", "training")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NUM_CLASSES = 1000
WARMUP_STEPS = 3
STEP_LIMIT = 30.0  # seconds; a sweep to the end of memory stops at slower steps


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured: the product of all lists. Ratios refer to the first backbone, mode, precision and layout.

    Attributes:
        backbones: names as `evmamba.tasks.backbones.build_backbone` takes them.
        resolutions: height and width of the images in pixels.
        batch_sizes: images of a step.
        until_memory_ends: go on doubling the batch after the last of `batch_sizes` until no backbone has room.
        modes: eager, fused (eager with BatchNorms folded into convolutions: `evmamba.fuse`, for others than ours
            torch.fx's), compiled (torch.compile), graph (CUDA graph of the eager step).
        phases: inference, training (forward, backward, AdamW).
        precisions: float32, or autocast to bfloat16 or float16 (without loss scaling).
        layouts: memory format of images and convolutions, contiguous or channels_last.
        device: cpu or cuda.
        pyramid: measure feature pyramids in place of classifiers for 1000 classes.
        seconds: time given to one row, shared by its rounds.
        operators: how many of each backbone's slowest operators to list, 0 for none.
    """

    backbones: Sequence[str] = ("efficientvmamba_t",)
    resolutions: Sequence[tuple[int, int]] = ((224, 224),)
    batch_sizes: Sequence[int] = (1,)
    until_memory_ends: bool = False
    modes: Sequence[str] = ("eager",)
    phases: Sequence[str] = ("inference",)
    precisions: Sequence[str] = ("float32",)
    layouts: Sequence[str] = ("contiguous",)
    device: str = "cpu"
    pyramid: bool = False
    seconds: float = 2.0
    operators: int = 0

    def __post_init__(self) -> None:
        choices = {"mode": MODES, "phase": PHASES, "precision": tuple(MEASURED), "layout": tuple(LAYOUTS)}
        for kind, valid in choices.items():
            for name in getattr(self, f"{kind}s"):
                if name not in valid:
                    raise unknown_name(kind, name, valid)
        if self.device not in ("cpu", "cuda"):
            raise unknown_name("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device is available here; use --device cpu")
        sizes = (*itertools.chain(*self.resolutions), *self.batch_sizes)
        if not self.backbones or not sizes or min(sizes) < 1 or self.seconds <= 0:
            raise UserError("a profile needs a backbone, positive resolutions and batch sizes, and time")


@dataclass(frozen=True)
class Case:
    """What the backbones are compared at."""

    height: int
    width: int
    batch_size: int
    phase: str
    mode: str
    precision: str
    layout: str

    @property
    def setting(self) -> tuple[str, str, str]:
        """All but the size of the work."""
        return self.mode, self.precision, self.layout

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.phase} {self.height}x{self.width} batch {self.batch_size} {' '.join(self.setting)}"


@dataclass(frozen=True)
class Row:
    """One backbone in one case; where `reason` is set nothing else was measured.

    Attributes:
        latency_ms, latency_p95_ms: of a step, median and 95th percentile of single, synchronised steps.
        images_per_s: from the median.
        memory_mb: peak, with the weights (and gradients and optimizer state): CUDA tensors; on the CPU the tensors
            that persist and the rise of resident memory during a step.
        ratio: images per second over those of the first backbone in the first mode, precision and layout, in the same
            rounds.
        joule_per_image: from the board's energy counter (NVML), where there is one.
        prepare_s: building, compiling or capturing, and the warm-up.
        steps: timed steps.
    """

    backbone: str
    case: Case
    latency_ms: float | None = None
    latency_p95_ms: float | None = None
    images_per_s: float | None = None
    memory_mb: float | None = None
    ratio: float | None = None
    joule_per_image: float | None = None
    prepare_s: float | None = None
    steps: int = 0
    reason: str | None = None

    def flat(self) -> dict[str, Any]:
        """One level of names and numbers, for JSON."""
        fields = dataclasses.asdict(self)
        return {"backbone": fields.pop("backbone"), **fields.pop("case"), **fields}


class NotMeasured(Exception):
    """Why a cell has no number: out of memory, or a mode that this device or model does not have."""


@dataclass
class Runner:
    """A backbone that is ready to take steps, and what it took."""

    name: str
    case: Case
    step: Callable[[], object]
    memory: int
    prepare_s: float
    rounds: list[list[float]]
    joules: float = 0.0

    @property
    def times(self) -> list[float]:
        return [seconds for one_round in self.rounds for seconds in one_round]


def profile(options: ProfileOptions, report: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Measure everything; `report` hears what is being prepared or measured.

    Raises:
        UserError: a backbone that does not exist or has no pyramid.
    """
    for name in options.backbones:
        build_backbone(name, features_only=options.pyramid, num_classes=NUM_CLASSES)
    rows: list[Row] = []
    for (height, width), phase in itertools.product(options.resolutions, options.phases):
        memory = _MemoryForecast()
        for batch_size in _batch_sizes(options):
            settings = itertools.product(options.modes, options.precisions, options.layouts)
            cases = [Case(height, width, batch_size, phase, *setting) for setting in settings]
            new = _measure_together(cases, options, memory, report)
            rows += new
            if all(row.reason for row in new):  # a larger batch has no better chance
                break
    return rows


def _batch_sizes(options: ProfileOptions) -> Iterator[int]:
    yield from options.batch_sizes
    size = options.batch_sizes[-1]
    while options.until_memory_ends:
        size *= 2
        yield size


def _measure_together(
    cases: Sequence[Case], options: ProfileOptions, memory: "_MemoryForecast", report: Callable[[str], None]
) -> list[Row]:
    entries = list(itertools.product(cases, options.backbones))
    rows: list[Row | Runner] = []
    # Variants of one network share its code, and compiled code is kept by code: a limit of a few would be met silently.
    with torch._dynamo.config.patch(recompile_limit=max(8, 4 * len(entries))):
        for case, name in entries:
            report(f"preparing {name}, {case.label}")
            try:
                memory.check(name, case, options)
                rows.append(runner := _prepare(name, case, options))
                memory.known[name, case.setting] = case.batch_size, runner.memory
            except Exception as error:  # somebody's model may fail in any way: the row says how
                rows.append(Row(name, case, reason=_reason(error)))
        energy = energy_counter(options.device)
        for done in range(ROUNDS):
            report(f"measuring {cases[0].label}, round {done + 1} of {ROUNDS}")
            for i, entry in enumerate(rows):
                if not isinstance(entry, Runner):
                    continue
                try:
                    _take_turn(entry, torch.device(options.device), options.seconds / ROUNDS, energy)
                except Exception as error:  # those prepared after it may have left too little memory
                    rows[i] = Row(entry.name, entry.case, reason=_reason(error))
    first = rows[0] if isinstance(rows[0], Runner) else None
    measured = [_row(entry, first, energy is not None) if isinstance(entry, Runner) else entry for entry in rows]
    rows.clear()
    first = None
    _forget(options.device)
    return measured


def _take_turn(runner: Runner, device: torch.device, seconds: float, energy: Callable[[], float] | None) -> None:
    before = energy() if energy else 0.0
    times: list[float] = []
    while not times or sum(times) < seconds:
        times.append(timed(runner.step, device))
    runner.rounds.append(times)
    runner.joules += energy() - before if energy else 0.0


def _row(runner: Runner, first: Runner | None, with_energy: bool) -> Row:
    median, p95 = (float(value) for value in np.percentile(runner.times, [50, 95]))
    ratio = None
    if first is not None:
        pairs = zip(first.rounds, runner.rounds, strict=True)
        ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
    steps = len(runner.times)
    return Row(
        runner.name,
        runner.case,
        latency_ms=1e3 * median,
        latency_p95_ms=1e3 * p95,
        images_per_s=runner.case.batch_size / median,
        memory_mb=runner.memory / MEBIBYTE,
        ratio=ratio,
        joule_per_image=runner.joules / (steps * runner.case.batch_size) if with_energy else None,
        prepare_s=runner.prepare_s,
        steps=steps,
    )


def _prepare(name: str, case: Case, options: ProfileOptions) -> Runner:
    """Build a backbone and its step, warm it up and see what memory it takes."""
    device = torch.device(options.device)
    if case.mode == "graph" and device.type != "cuda":
        raise NotMeasured("CUDA graphs need a GPU")
    if case.mode == "fused" and case.phase == "training":
        raise NotMeasured("folded BatchNorms are not trained")
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    peak = watch_memory(device)
    runner: Runner | None = None

    def prepare() -> Runner:
        torch.manual_seed(0)
        model = build_backbone(name, features_only=options.pyramid, num_classes=NUM_CLASSES)
        model.to(device).to(memory_format=LAYOUTS[case.layout]).train(case.phase == "training")
        if case.mode == "fused":
            model = _fused(model)
        image = torch.randn(case.batch_size, 3, case.height, case.width, device=device)
        image = image.contiguous(memory_format=LAYOUTS[case.layout])
        step, kept = _step(model, image, case)
        slow = max(timed(step, device) for _ in range(WARMUP_STEPS))
        if options.until_memory_ends and slow > STEP_LIMIT and case.batch_size > options.batch_sizes[-1]:
            raise NotMeasured(f"a step takes longer than {STEP_LIMIT:.0f} s")
        return Runner(name, case, step, _bytes(kept()), 0.0, [])

    def timed_preparation() -> None:
        nonlocal runner
        runner = prepare()

    prepare_s = timed(timed_preparation, device)
    assert runner is not None
    runner.prepare_s = prepare_s
    if device.type == "cuda":
        runner.memory = peak()[0] - before
    else:
        # The process holds compilers and other models too: what persists is counted, what comes and goes is watched.
        peak = watch_memory(device)
        runner.step()
        runner.memory += max(0, peak()[0])
    return runner


def _fused(model: nn.Module) -> nn.Module:
    """The network without its BatchNorms; itself if it has none."""
    if any(isinstance(module, ConvBranch | InvertedResidual) for module in model.modules()):
        return fuse(model)
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    fused = cast(GraphModule, fuse_conv_bn(model))
    if left := sum(_is_batch_norm(fused, node) for node in fused.graph.nodes):
        raise NotMeasured(f"torch.fx cannot fold {left} of its BatchNorms")
    return fused


def _is_batch_norm(network: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), nn.BatchNorm2d)
    return node.target in (torch.batch_norm, nn.functional.batch_norm)


def _step(model: nn.Module, image: Tensor, case: Case) -> tuple[Callable[[], object], Callable[[], list[Tensor]]]:
    """One step of the case, and a function that lists the tensors which live between steps."""
    amp = autocast_to(MEASURED[case.precision])
    forward = torch.compile(model, dynamic=False) if case.mode == "compiled" else model
    optimizer: torch.optim.Optimizer | None = None
    if case.phase == "training":
        step, optimizer = training_step(model, (image,), amp, forward=forward, capturable=case.mode == "graph")
    else:
        step = inference_step(forward, (image,), amp)

    def kept() -> list[Tensor]:
        states = optimizer.state.values() if optimizer else ()
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        parameters = list(model.parameters())
        return [image, *parameters, *model.buffers(), *moments, *(p.grad for p in parameters if p.grad is not None)]

    return _captured(step) if case.mode == "graph" else step, kept


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step as a CUDA graph, to be replayed in its place."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return functools.partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Callable[[], None]) -> None:
    # The graph uses the step's weights and images where they lie: they have to live as long as it does.
    graph.replay()


class _MemoryForecast:
    """Keeps a batch off the CPU that would not fit: Linux then kills the process instead of refusing memory.

    Memory grows no faster than the batch. A GPU refuses for itself.
    """

    def __init__(self) -> None:
        # Batch size and bytes, by backbone and setting.
        self.known: dict[tuple[str, tuple[str, str, str]], tuple[int, int]] = {}

    def check(self, name: str, case: Case, options: ProfileOptions) -> None:
        """Raise NotMeasured if this batch has no room."""
        if options.device != "cpu" or case.batch_size == 1:
            return
        key = name, case.setting
        if key not in self.known:
            single = dataclasses.replace(case, batch_size=1, mode="eager")
            self.known[key] = 1, _prepare(name, single, options).memory
        batch, memory = self.known[key]
        needed, free = memory * case.batch_size / batch, free_memory()
        if needed > free:
            raise NotMeasured(f"out of memory: about {needed / MEBIBYTE:.0f} MB needed, {free / MEBIBYTE:.0f} MB free")


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's if that is less."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = min(free, limit)
    return max(0, free)


def energy_counter(device: str) -> Callable[[], float] | None:
    """The board's energy so far in joule, if NVML (package nvidia-ml-py) can tell."""
    if device != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no such counter, no permission: energy is an extra
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if isinstance(error, (NotMeasured, UserError)) else f"{type(error).__name__}: {text}"


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _forget(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def about(device: str) -> dict[str, Any]:
    """Where a profile is measured: device, threads, versions, code, and what else the machine does."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        # Processes that want a core, averaged over a minute: other work makes times longer.
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": versions(),
        **git_state(),
        "start": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
