"""How long the trainings of a benchmark will take, from a measured speed or a stated assumption.

A training takes (images seen / images a second), plus its validations at a third of a training step's work an image.
Images a second are those of the backbone's training step at 224 pixels, scaled by multiply-accumulates to the whole
network at the size that it is trained at; loading may be the limit instead. What is not measured is said to be assumed.
"""

import functools
import json
import math
import pydoc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evmamba.errors import UserError
from evmamba.launch.bench.graph import batch_of
from evmamba.launch.fit.settings import setting
from evmamba.launch.measure.cost import CLASSES, SIZE, count
from evmamba.launch.report.paper import claims
from evmamba.launch.store.estimates import Estimate, hours
from evmamba.launch.store.results import find_results, read_result
from evmamba.launch.store.spec import Spec, TrainingSpec
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.plain_files import read_json

REFERENCE = "efficientvmamba_t"
# A training step's work is three forward passes: itself, and a backward pass of twice as much.
FORWARD_SHARE = 1 / 3
# Assumed: of a process among several, the share of its speed alone; images that a core decodes and augments a second.
TOGETHER, LOADING = 0.9, 100.0
# What to ask for: half as much again, and a start, in quarters of an hour.
MARGIN, START, QUARTER = 1.5, 300.0, 900.0


@dataclass(frozen=True)
class Speed:
    """Of training steps on one device.

    Attributes:
        macs_per_s: forward multiply-accumulates of the images of a second.
        by_model: the same, of backbones that were measured themselves.
        basis: where the numbers are from.
    """

    macs_per_s: float
    by_model: dict[str, float]
    basis: str

    def of(self, model: str) -> float:
        return self.by_model.get(model, self.macs_per_s)


def read_speed(source: str | None) -> Speed:
    """Read what is known of the device.

    Args:
        source: a number (images a second of EfficientVMamba-T's training step at 224 pixels), the JSON file of
            `evmamba profile --training`, result files of cost runs or a folder of them; None: an assumption.

    Raises:
        UserError: nothing in it was measured in training, or a number that is not positive.
    """
    if source is None:
        claim = claims(REFERENCE)[0]
        basis = (
            f"{claim.source}: {claim.images_per_s:g} images/s of T on one {claim.hardware}, training a third (assumed)"
        )
        return Speed(claim.images_per_s * FORWARD_SHARE * backbone_macs(REFERENCE), {}, basis)
    try:
        given = float(source)
    except ValueError:
        measured = _from_files(Path(source))
    else:
        check_rate("--speed", given)
        return Speed(given * backbone_macs(REFERENCE), {}, f"{given:g} images/s of T in training (given)")
    if not measured:
        raise UserError(
            f"{source} has no training step of a backbone: measure some with `evmamba profile --training` or "
            "`evmamba bench` on such a device, or give images a second"
        )
    first = next(iter(measured))
    return Speed(measured.get(REFERENCE, measured[first]), measured, f"measured in {source}")


def check_rate(option: str, rate: float) -> None:
    """Refuse images a second that nothing can have.

    Raises:
        UserError: not positive, or not finite.
    """
    if not 0 < rate < math.inf:
        raise UserError(f"{option} {rate:g}: give a positive number of images a second")


def _from_files(path: Path) -> dict[str, float]:
    """Backbone -> multiply-accumulates a second."""
    found: dict[str, float] = {}
    if path.is_file():
        document = read_json(path)
        if isinstance(document, dict) and isinstance(document.get("rows"), list):
            for row in document["rows"]:
                if row.get("phase") == "training" and row.get("images_per_s"):
                    area = row["height"] * row["width"] / math.prod(SIZE)
                    speed = row["images_per_s"] * area * backbone_macs(row["backbone"])
                    found[row["backbone"]] = max(speed, found.get(row["backbone"], 0.0))
            return found
    for file in find_results([path]):
        result = read_result(file)
        if result.head is None and (speed := result.cost.get("train_images_per_s")) and result.cost.get("macs"):
            found[result.model] = speed * result.cost["macs"]
    return found


def estimate(spec: TrainingSpec, speed: Speed, cores: int | None = None, loading: float = LOADING) -> Estimate | None:
    """Estimate a training.

    Args:
        spec: the run, on its resources.
        speed: of one of its devices.
        cores: for a process; None: loading is no limit.
        loading: images a second and core.

    Returns:
        None where the recipe has no end or no batch.
    """
    batch = batch_of(spec)
    if batch is None:
        return None
    data = spec.settings["data"]
    # The same images for every seed: they are counted once.
    train, val = _images(data["class_path"], json.dumps(data.get("init_args", {}) | {"seed": 0}))
    steps_per_epoch = max(1, train // batch.total)
    epochs, steps = setting(spec.settings, "trainer.max_epochs"), setting(spec.settings, "trainer.max_steps")
    limits = [epochs * steps_per_epoch] if epochs and epochs > 0 else []
    limits += [steps] if steps and steps > 0 else []
    if not limits:
        return None
    steps = min(limits)
    processes = spec.resources.processes
    alone = speed.of(spec.model) / macs_of(spec)
    each = alone * (TOGETHER if processes > 1 else 1.0)
    limited = cores is not None and cores * loading < each
    if cores is not None and limited:
        each = cores * loading
    training = steps * batch.total / (each * processes)
    validations = _validations(spec, steps, steps_per_epoch, batch.accumulate)
    rate = min(alone / FORWARD_SHARE, cores * loading) if cores is not None else alone / FORWARD_SHARE
    seconds = training + validations * val / (rate * processes)
    basis = [speed.basis, f"{each:.3g} images/s a process{', as loading allows' if limited else ''}"]
    basis += [f"{TOGETHER:.0%} of that alone (assumed)"] if processes > 1 and not limited else []
    basis += [f"{loading:g} images/s to load a core"] if limited else []
    return Estimate(seconds, processes, "; ".join(basis))


def macs_of(spec: TrainingSpec) -> float:
    """Multiply-accumulates of a training image: of backbone and head at the size of training."""
    task = TASKS[spec.task]
    side = setting(spec.settings, task.trained_side) if task.trained_side else SIZE[0]
    side = max(side) if isinstance(side, list | tuple) else side
    pixels = side * side * task.trained_aspect
    if task.whole is None:
        return backbone_macs(spec.model) * pixels / math.prod(SIZE)
    options = {name: setting(spec.settings, f"model.init_args.{name}") for name in task.whole_options}
    return _whole_macs(spec.task, str(spec.head), spec.model, json.dumps(options)) * pixels


def _validations(spec: TrainingSpec, steps: int, steps_per_epoch: int, accumulate: int) -> float:
    if setting(spec.settings, "trainer.limit_val_batches") == 0:
        return 0
    interval = setting(spec.settings, "trainer.val_check_interval")
    every = setting(spec.settings, "trainer.check_val_every_n_epoch")
    if isinstance(interval, int):  # in batches, of which a step may take several
        return steps * accumulate // interval
    share = interval if isinstance(interval, float) and interval else 1.0
    return steps / steps_per_epoch / (every or 1) / share


@functools.cache
def backbone_macs(model: str) -> float:
    """Of the classifier at 224 pixels."""
    return count(build_backbone(model, features_only=False, num_classes=CLASSES), SIZE).paper


@functools.cache
def _whole_macs(task: str, head: str, model: str, options: str) -> float:
    """Of a pixel of the backbone with its head."""
    network = TASKS[task].load("whole")(head, model, **json.loads(options))
    return count(network.counted, network.size).paper / math.prod(network.size)


@functools.cache
def _images(class_path: str, arguments: str) -> tuple[int, int]:
    data = pydoc.locate(class_path)(**json.loads(arguments))  # type: ignore[operator]
    train, val = map(len, data.image_paths())
    held = round(data.held_out * train)
    return (train - held, held) if data.held_out else (train, val)


def limit(seconds: float) -> str:
    """The time limit to ask for, as SLURM writes it."""
    quarters = math.ceil((MARGIN * seconds + START) / QUARTER)
    days, rest = divmod(quarters * int(QUARTER), 86400)
    return f"{f'{days}-' if days else ''}{rest // 3600:02d}:{rest % 3600 // 60:02d}:00"


def print_estimates(specs: Sequence[Spec], estimates: dict[str, Estimate], console: Console) -> None:
    """Print hours, GPU-hours and time limits of the trainings, their sum, and what they are made of."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("estimate", "hours", "GPU-hours", "ask for"):
        table.add_column(header, justify="left" if header == "estimate" else "right")
    for spec in specs:
        if found := estimates.get(spec.name):
            table.add_row(spec.name, hours(found.seconds), f"{found.gpu_hours:.1f}", f"--time {limit(found.seconds)}")
    total = sum(found.gpu_hours for found in estimates.values())
    table.add_row("all trainings", "", f"{total:.1f}", "", style="bold")
    console.print(table)
    for basis in dict.fromkeys(found.basis.split(";")[0] for found in estimates.values()):
        console.print(f"by {basis}; tests and cost runs are not counted", style="dim", highlight=False, soft_wrap=True)
