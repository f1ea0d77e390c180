"""What a network costs: counts, latency, throughput, memory and training step, and their curves over size and batch.

A cost run measures the bare classifier, or with a head the whole detector or segmentor as the paper counts it:
detectors at 800 x 1280 and UPerNet at 512 x 2048 pixels.
"""

import datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from evmamba import cost
from evmamba.launch.measure.profiling import energy_counter
from evmamba.launch.store.precision import DEFAULT, autocast_to
from evmamba.launch.store.results import Result, device_name, git_state, provenance, write_result
from evmamba.launch.store.spec import CostSpec, Timing, origin_of
from evmamba.launch.store.sweeps import Point, sweep
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.whole import WholeNetwork

CLASSES = 1000
SIZE = (224, 224)
# A point of a curve is measured more briefly than the number of the table.
SWEEP = {"warmup": 3, "steps": 10}
# The board's counter moves about ten times a second.
ENERGY_SECONDS = 3.0


def measure_cost(spec: CostSpec, folder: Path) -> None:
    """Measure what `spec.timing` asks for and write the result."""
    start = datetime.datetime.now(datetime.UTC)
    git_state()  # before anything takes long
    torch.manual_seed(spec.seed)
    result = _measure_classifier(spec) if spec.head is None else _count_whole(spec)
    result.suite = spec.suite
    result.provenance = provenance(
        config=msgspec.to_builtins(spec),
        seed=spec.seed,
        device=device_name(spec.device),
        precision=spec.precision or DEFAULT,
        start=start,
    ) | {**origin_of(spec), "threads": torch.get_num_threads()}
    write_result(result, folder)


def count(model: nn.Module, size: tuple[int, int]) -> cost.Macs:
    """Multiply-accumulates for one image of a size (height, width), from shapes alone: nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return cost.count_macs(model, inputs=(torch.empty(1, 3, *size),))


def _measure_classifier(spec: CostSpec) -> Result:
    timing = spec.timing
    model = build_backbone(spec.model, features_only=False, num_classes=CLASSES)
    macs = count(model, SIZE)
    where: dict[str, Any] = {"device": spec.device, "amp": autocast_to(spec.precision)}
    steps: dict[str, Any] = {"warmup": timing.warmup_steps, "steps": timing.timed_steps}
    single = cost.measure_inference(model, (3, *SIZE), 1, **steps, **where)
    batch = cost.measure_inference(model, (3, *SIZE), timing.batch_size, **steps, **where)
    numbers: dict[str, Any] = {
        "parameters": cost.count_parameters(model),
        "macs": macs.paper,
        "macs_plain": macs.plain,
        "latency_ms_median": single["latency_ms_median"],
        "latency_ms_p95": single["latency_ms_p95"],
        "images_per_s": batch["images_per_s"],
        "batch_size": timing.batch_size,
        "peak_memory_mb": batch["peak_memory_mb"],
        "peak_memory_kind": batch["peak_memory_kind"],
    }
    if timing.training_batch:
        training = cost.measure_training(model, (3, *SIZE), timing.training_batch, **steps, **where)
        numbers |= {
            "train_ms_median": training["latency_ms_median"],
            "train_ms_p95": training["latency_ms_p95"],
            "train_images_per_s": training["images_per_s"],
            "train_batch_size": timing.training_batch,
            "train_peak_memory_mb": training["peak_memory_mb"],
        }
    numbers |= _energy(model, timing.batch_size, where["amp"], spec.device)
    brief: dict[str, Any] = {name: min(SWEEP[name], steps[name]) for name in SWEEP}

    def at_batch(size: int) -> Point:
        return dict(cost.measure_inference(model, (3, *SIZE), size, **brief, **where))

    def at_size(side: int) -> Point:
        counted = count(model, (side, side))
        point = {"macs": counted.paper, "macs_plain": counted.plain, "batch_size": 1}
        return point | cost.measure_inference(model, (3, side, side), 1, **brief, **where)

    batches = [2**i for i in range(timing.max_batch.bit_length())]
    sweeps = {
        "batch_size": sweep("batch_size", batches, at_batch),
        "input_size": sweep("input_size", timing.input_sizes, at_size),
    }
    return Result(
        run=spec.name,
        task="cost",
        model=spec.model,
        cost=numbers,
        protocol={"input_size": [3, *SIZE], "num_classes": CLASSES} | _asked(timing),
        details={"macs_by_op": macs.by_op},
        sweeps={name: points for name, points in sweeps.items() if points},
    )


def _asked(timing: Timing) -> dict[str, Any]:
    """What a result says about its timing: the steps, and what else was measured."""
    steps = {"warmup_steps": timing.warmup_steps, "timed_steps": timing.timed_steps}
    return {name: value for name, value in msgspec.structs.asdict(timing).items() if value} | steps


def _energy(model: nn.Module, batch_size: int, amp: torch.dtype | None, device: str) -> dict[str, float]:
    """Joule per image of inference in batches, where NVML counts the board's energy; else nothing."""
    energy = energy_counter(device)
    if energy is None:
        return {}
    images = torch.rand(batch_size, 3, *SIZE, device=device)
    model.to(device).eval()
    step = cost.inference_step(model, (images,), amp)
    steps, seconds, before = 0, 0.0, energy()
    while seconds < ENERGY_SECONDS:
        seconds += cost.timed(step, images.device)
        steps += 1
    joule = energy() - before
    model.to("cpu")
    return {"energy_j_per_image": joule / (steps * batch_size)}


def _count_whole(spec: CostSpec) -> Result:
    """Parameters and multiply-accumulates of a backbone with its head; on a GPU also its latency."""
    assert spec.head is not None
    task = TASKS.of_head(spec.head)
    network: WholeNetwork = task.load("whole")(spec.head, spec.model, **spec.head_options)
    macs = count(network.counted, network.size)
    numbers: dict[str, Any] = {
        "parameters": cost.count_parameters(network.model),
        "macs": macs.paper,
        "macs_plain": macs.plain,
        "batch_size": 1,
    }
    if spec.device == "cuda":
        inputs = network.inputs(torch.rand(3, *network.size, device="cuda"))
        steps: dict[str, Any] = {"warmup": spec.timing.warmup_steps, "steps": spec.timing.timed_steps}
        amp = autocast_to(spec.precision)
        numbers |= cost.measure_inference(network.model, inputs=inputs, device="cuda", amp=amp, **steps)
    also = {name: count(model, network.size).paper for name, model in network.also_counted.items()}
    return Result(
        run=spec.name,
        task="cost",
        model=spec.model,
        head=spec.head,
        cost=numbers,
        protocol={"input_size": [3, *network.size], "num_classes": network.num_classes}
        | _asked(spec.timing)
        | spec.head_options,
        details=also | {"macs_by_op": macs.by_op},
    )
