"""Where the time of a backbone's inference goes: by operator, and by part of the network."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from evmamba.cost import inference_step
from evmamba.launch.measure.profiling import LAYOUTS, NUM_CLASSES, ProfileOptions
from evmamba.launch.store.precision import MEASURED, autocast_to
from evmamba.tasks.backbones import build_backbone

STEPS = 5
SMALLEST_PART = 0.01


@dataclass(frozen=True)
class Share:
    """One operator or part of one backbone: milliseconds a step, share of the whole, calls a step."""

    backbone: str
    kind: str
    name: str
    ms: float
    share: float
    calls: float

    def flat(self) -> dict[str, Any]:
        return asdict(self)


def shares(options: ProfileOptions) -> list[Share]:
    """The slowest `options.operators` operators, and the parts, of every backbone: eager, first size, batch and so on.

    Operators by their own time (on a GPU their kernels'), without what they call. Parts are the network's direct
    children, lists and sequences opened once, each timed with the device idle before and after, those under 1 %
    left out.
    """
    found: list[Share] = []
    device = torch.device(options.device)
    layout = LAYOUTS[options.layouts[0]]
    for name in options.backbones:
        torch.manual_seed(0)
        model = build_backbone(name, features_only=options.pyramid, num_classes=NUM_CLASSES)
        model.to(device).to(memory_format=layout).eval()
        image = torch.randn(options.batch_sizes[0], 3, *options.resolutions[0], device=device)
        amp = autocast_to(MEASURED[options.precisions[0]])
        step = inference_step(model, (image.contiguous(memory_format=layout),), amp)
        step()
        found += [*_operators(name, step, device, options.operators), *_parts(name, model, step, device)]
    return found


def _operators(backbone: str, step: Any, device: torch.device, count: int) -> list[Share]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report starting and stopping
    on_gpu = device.type == "cuda"
    with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        for _ in range(STEPS):
            step()
    # Kernels are events of their own besides; an operator's time on the GPU is that of the kernels it launched.
    events = [event for event in trace.key_averages() if event.device_type == DeviceType.CPU]
    times = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in events}
    whole = sum(microseconds for microseconds, _ in times.values())
    slowest = sorted(times.items(), key=lambda item: item[1], reverse=True)[:count]
    return [
        Share(backbone, "operator", name, us / 1e3 / STEPS, us / whole, calls / STEPS) for name, (us, calls) in slowest
    ]


def _parts(backbone: str, model: nn.Module, step: Any, device: torch.device) -> list[Share]:
    seconds: defaultdict[str, float] = defaultdict(float)
    started: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def hooks(name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, arguments: Any) -> None:
            started[name] = now()

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            seconds[name] += now() - started[name]

        return before, after

    handles = []
    for name, module in _children(model):
        before, after = hooks(name)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    start = now()
    for _ in range(STEPS):
        step()
    whole = now() - start
    for handle in handles:
        handle.remove()
    shown = [(name, part) for name, part in seconds.items() if part > SMALLEST_PART * whole]
    return [Share(backbone, "part", name, 1e3 * part / STEPS, part / whole, 1.0) for name, part in shown]


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child):
            yield from ((f"{name}.{inner}", module) for inner, module in child.named_children())
        else:
            yield name, child
