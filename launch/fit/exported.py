"""A trained network as others will run it: its accuracy, size and latency as an ONNX file, float32 or INT8.

The task's own test runs again, on the same images, with the network (a detector's backbone) replaced by onnxruntime.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from evmamba.cost import measure_inference
from evmamba.errors import UserError
from evmamba.export import export_onnx, need_onnx
from evmamba.launch.store.spec import EXPORTED_FORMS
from evmamba.onnx_files import OnnxNetwork, quantize
from evmamba.tasks import TASKS
from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.module import TaskModule

FOLDER = "exported"
CALIBRATION_IMAGES = 64
TIMED: dict[str, Any] = {"warmup": 3, "steps": 15}


@dataclass(frozen=True)
class Exported:
    """What a result says about exported forms, each as ``FORM_NAME``.

    Attributes:
        metrics: of the test, e.g. ``int8_top1``.
        cost: ``onnx_mb`` and ``onnx_latency_ms``: of one image on the CPU.
        details: how they were measured.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def measure_exported(trainer: L.Trainer, module: TaskModule, data: TaskDataModule, folder: Path) -> Exported:
    """Write and test a trained network in all `EXPORTED_FORMS`; the files stay in ``folder/exported``.

    INT8 is calibrated with `CALIBRATION_IMAGES` images of the training split, as the training sees them.

    Raises:
        UserError: libraries are missing, the run has several processes, the network cannot be exported, or its graph
            deviates from PyTorch.
    """
    need_onnx()
    if trainer.world_size > 1:
        raise UserError("exported networks are tested by one process: give the evaluation one, or leave --exported out")
    task = TASKS[module.task]
    place = task.network_at or task.backbone_at
    network = module.get_submodule(place)
    files = {form: folder / FOLDER / f"{form}.onnx" for form in EXPORTED_FORMS}
    files["onnx"].parent.mkdir(parents=True, exist_ok=True)
    export_onnx(copy.deepcopy(network).cpu().float(), files["onnx"])
    metrics: dict[str, float] = {}
    cost: dict[str, float] = {}
    for form, file in files.items():
        if form == "int8":
            data.setup("fit")
            quantize(files["onnx"], file, _inputs(module, data, network))
        session = OnnxNetwork(file)
        shapes: list[tuple[int, ...]] = []
        session.register_forward_pre_hook(lambda _, args, shapes=shapes: shapes.append(tuple(args[0].shape[1:])))
        with _replaced(module, place, session):
            trainer.test(module, datamodule=data, verbose=False)
        metrics |= {f"{form}_{name}": float(value) for name, value in module.evaluation.metrics.items()}
        shape = shapes[0]
        size = (shape[0], shape[1], shape[2])
        timed = measure_inference(session, size, 1, device="cpu", **TIMED)
        cost[f"{form}_mb"] = file.stat().st_size / 2**20
        cost[f"{form}_latency_ms"] = timed["latency_ms_median"]
    details = {
        "what": "the network" if task.network_at else "the backbone; the rest by PyTorch",
        "runtime": f"onnxruntime {metadata.version('onnxruntime')} on the CPU",
        "threads": torch.get_num_threads(),
        "latency_input": list(shape),
        "calibration_images": CALIBRATION_IMAGES,
    }
    return Exported(metrics, cost, details)


def _inputs(module: TaskModule, data: TaskDataModule, network: nn.Module) -> list[Tensor]:
    """What the network gets when the module predicts `CALIBRATION_IMAGES` training images: batches [B, C, H, W]."""
    seen: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().cpu()))
    module.eval()
    try:
        with torch.no_grad():
            for batch in data.train_dataloader():
                batch = data.transfer_batch_to_device(batch, module.device, 0)
                module.predict_step(data.on_after_batch_transfer(batch, 0), 0)
                if sum(map(len, seen)) >= CALIBRATION_IMAGES:
                    break
    finally:
        hook.remove()
    images = [image for batch in seen for image in batch.split(1)]
    return images[:CALIBRATION_IMAGES]


@contextmanager
def _replaced(module: nn.Module, place: str, other: nn.Module) -> Iterator[None]:
    network = module.get_submodule(place)
    module.set_submodule(place, other)
    try:
        yield
    finally:
        module.set_submodule(place, network)
