"""What a network costs: counts, latency, throughput, memory and training step, and their curves over size and batch.

A cost run measures the bare classifier, or with a head the whole detector or segmentor as the paper counts it:
detectors at 800 x 1280 and UPerNet at 512 x 2048 pixels. The networks of a table take turns.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from evmamba import cost
from evmamba.launch.measure.profiling import energy_counter
from evmamba.launch.store.precision import DEFAULT, autocast_to
from evmamba.launch.store.result_schema import Provenance, Turns
from evmamba.launch.store.results import Result, device_name, git_state, now, provenance, write_result
from evmamba.launch.store.spec import CostSpec, Timing, failed_result, origin_of, reason_of
from evmamba.launch.store.sweeps import Point, sweep
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.whole import WholeNetwork

CLASSES = 1000
SIZE = (224, 224)
# A point of a curve is measured more briefly than the number of the table.
SWEEP = {"warmup": 3, "steps": 10}
# Names in a result of what `cost.Timing` has, of each thing that is measured in turns.
SINGLE = {"latency_ms_median": "latency_ms_median", "latency_ms_p95": "latency_ms_p95"}
BATCH = {name: name for name in ("images_per_s", "peak_memory_mb", "peak_memory_kind")}
WHOLE = SINGLE | BATCH
TRAINING = {
    "latency_ms_median": "train_ms_median",
    "latency_ms_p95": "train_ms_p95",
    "images_per_s": "train_images_per_s",
    "peak_memory_mb": "train_peak_memory_mb",
}
# What of these a round tells too.
PER_ROUND = ("latency_ms_median", "latency_ms_p95", "images_per_s")
# The board's counter moves about ten times a second.
ENERGY_SECONDS = 3.0


@dataclass
class Subject:
    """A network that is measured, and its result so far.

    Attributes:
        spec: the run.
        result: what is known of it.
        model: the network.
        size: height and width of its images [pixels].
        inputs: its arguments in place of a batch of images, see `WholeNetwork`.
    """

    spec: CostSpec
    result: Result
    model: nn.Module
    size: tuple[int, int]
    inputs: Callable[[Tensor], tuple[Any, ...]] | None = None


def measure_cost(spec: CostSpec, folder: Path) -> None:
    """Measure what `spec.timing` asks for and write the result; with the first of a table's networks (`spec.together`)
    the others are measured too, in turns, and their results are written beside it.

    Raises:
        Exception: what ended the measurement of `spec` itself. Others that fail have a failed result.
    """
    start = now()
    git_state()  # before anything takes long
    members = spec.members if spec.leads else [spec]
    folders = [folder if member == spec else folder.parent / member.name for member in members]
    found = measure_in_turns(members)
    about = Turns(runs=[member.name for member in members], start=start.isoformat(timespec="seconds"))
    failure: Exception | None = None
    for member, place, result in zip(members, folders, found, strict=True):
        if isinstance(result, Exception):
            if member == spec:
                failure = result
                continue
            print(f"{member.name}: {type(result).__name__}: {result}", file=sys.stderr)
            result = failed_result(member, reason_of(result), start)
        else:
            result.suite = member.suite
            result.provenance = (
                provenance(
                    config=msgspec.to_builtins(member),
                    seed=member.seed,
                    device=device_name(member.device),
                    precision=member.precision or DEFAULT,
                    start=start,
                )
                | origin_of(member)
                | Provenance(threads=torch.get_num_threads(), turns=about)
            )
        if member != spec:
            member.write(place)
        write_result(result, place)
    if failure is not None:
        raise failure


def measure_in_turns(specs: Sequence[CostSpec]) -> list[Result | Exception]:
    """Measure networks side by side, all with the timing, device and precision of the first; without provenance."""
    spec = specs[0]
    timing = spec.timing
    found: list[Result | Exception] = []
    subjects: dict[int, Subject] = {}
    for k, one in enumerate(specs):
        torch.manual_seed(one.seed)
        try:
            subjects[k] = _classifier(one) if one.head is None else _whole(one)
            found.append(subjects[k].result)
        except Exception as error:  # somebody's model may fail in any way; the others go on
            found.append(error)
    where: dict[str, Any] = {"device": spec.device, "amp": autocast_to(spec.precision)}
    if spec.head is None:
        phases = [(cost.ready_for_inference, 1, SINGLE), (cost.ready_for_inference, timing.batch_size, BATCH)]
        if timing.training_batch:
            phases.append((cost.ready_for_training, timing.training_batch, TRAINING))
    else:
        # On a CPU whole detectors and segmentors are counted only: they would take minutes.
        phases = [(cost.ready_for_inference, 1, WHOLE)] if spec.device == "cuda" else []
    for ready, batch_size, names in phases:
        steps = [functools.partial(_ready, ready, subject, batch_size, where) for subject in subjects.values()]
        turns = cost.take_turns(
            steps, batch_size, warmup=timing.warmup_steps, steps=timing.timed_steps, device=spec.device
        )
        for k, measured in zip(list(subjects), turns, strict=True):
            if isinstance(measured, Exception):
                found[k] = measured
                del subjects[k]
            else:
                _note(subjects[k].result, measured, names)
    for k, subject in subjects.items() if spec.head is None else ():
        try:
            _alone(subject, where)
        except Exception as error:
            found[k] = error
    return found


def _ready(
    ready: Callable[..., contextlib.AbstractContextManager[Callable[[], None]]],
    subject: Subject,
    batch_size: int,
    where: Mapping[str, Any],
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    inputs = subject.inputs and subject.inputs(torch.rand(3, *subject.size, device=where["device"]))
    return ready(subject.model, (3, *subject.size), batch_size, inputs=inputs, **where)


def _note(result: Result, measured: cost.Turns, names: Mapping[str, str]) -> None:
    """Put what was measured into a result, by the names that its numbers have there, and the rounds behind it."""
    numbers: dict[str, Any] = dict(measured.timing)
    result.cost |= {name: numbers[key] for key, name in names.items()}
    rounds = result.details.setdefault("rounds", {})
    for key, name in names.items():
        if key in PER_ROUND:
            rounds[name] = [dict(one)[key] for one in measured.rounds]


def count(model: nn.Module, size: tuple[int, int]) -> cost.Macs:
    """Multiply-accumulates for one image of a size (height, width), from shapes alone: nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return cost.count_macs(model, inputs=(torch.empty(1, 3, *size),))


def _classifier(spec: CostSpec) -> Subject:
    model = build_backbone(spec.model, features_only=False, num_classes=CLASSES)
    macs = count(model, SIZE)
    timing = spec.timing
    numbers = {
        "parameters": cost.count_parameters(model),
        "macs": macs.paper,
        "macs_plain": macs.plain,
        "batch_size": timing.batch_size,
    }
    if timing.training_batch:
        numbers["train_batch_size"] = timing.training_batch
    result = Result(
        run=spec.name,
        task="cost",
        model=spec.model,
        cost=numbers,
        protocol={"input_size": [3, *SIZE], "num_classes": CLASSES} | _asked(timing),
        details={"macs_by_op": macs.by_op},
    )
    return Subject(spec, result, model, SIZE)


def _alone(subject: Subject, where: Mapping[str, Any]) -> None:
    """What is measured of each network on its own: energy, and curves over batch and size."""
    model, timing = subject.model, subject.spec.timing
    subject.result.cost |= _energy(model, timing.batch_size, where["amp"], where["device"])
    steps = {"warmup": timing.warmup_steps, "steps": timing.timed_steps}
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
    subject.result.sweeps = {name: points for name, points in sweeps.items() if points}


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


def _whole(spec: CostSpec) -> Subject:
    """A backbone with its head: parameters and multiply-accumulates."""
    assert spec.head is not None
    task = TASKS.of_head(spec.head)
    network: WholeNetwork = task.load("whole")(spec.head, spec.model, **spec.head_options)
    macs = count(network.counted, network.size)
    also = {name: count(model, network.size).paper for name, model in network.also_counted.items()}
    result = Result(
        run=spec.name,
        task="cost",
        model=spec.model,
        head=spec.head,
        cost={
            "parameters": cost.count_parameters(network.model),
            "macs": macs.paper,
            "macs_plain": macs.plain,
            "batch_size": 1,
        },
        protocol={"input_size": [3, *network.size], "num_classes": network.num_classes}
        | _asked(spec.timing)
        | spec.head_options
        | dict(network.protocol),
        details=also | {"macs_by_op": macs.by_op},
    )
    return Subject(spec, result, network.model, network.size, network.inputs)
