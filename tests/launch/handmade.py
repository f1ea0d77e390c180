"""Specs and results made by hand, so that store and report are tested without a training."""

from typing import Any

from evmamba.launch.store.results import Result
from evmamba.launch.store.spec import CostSpec, Spec, TrainingSpec

DATA = {
    "classification": {"num_classes": 6, "val_images": 120},
    "detection": {"num_classes": 3, "val_images": 40},
    "segmentation": {"num_classes": 5, "val_images": 40},
}
METRICS = {
    "classification": {"top1": 0.81337, "top5": 0.99, "loss": 0.61},
    "detection": {"AP": 0.2512, "AP50": 0.5501, "AP75": 0.2, "APs": -1.0, "APm": 0.31, "APl": 0.402},
    "segmentation": {"mIoU": 0.5219, "pixel_acc": 0.9, "mean_acc": 0.61},
}
HEADS = {"classification": "linear", "detection": "retinanet", "segmentation": "upernet", "cost": None}
COST = {
    "efficientvmamba_t": {"parameters": 6_493_660, "macs": 806_436_096, "latency_ms_median": 41.23},
    "resnet18": {"parameters": 11_689_512, "macs": 1_824_033_792, "latency_ms_median": 23.5},
}


def origin(start: str = "2026-03-01T10:00:00+00:00") -> dict:
    return {
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "config": {"seed": 0},
        "config_hash": "abc",
        "seed": 0,
        "versions": {"evmamba": "0.1.0", "torch": "2.14.1"},
        "device": "Some CPU, 2 cores",
        "precision": "float32",
        "start": start,
        "duration_s": 61.0,
    }


def made_spec(task: str, model: str = "resnet18", seed: int = 0, **changes: Any) -> Spec:
    """A spec without settings, enough for who does not train."""
    fields = {"model": model, "seed": seed, "device": "cpu"} | changes
    if task == "cost":
        return CostSpec(**fields)
    return TrainingSpec(**{"task": task, "head": HEADS[task], "settings": {}} | fields)


def made_result(task: str, model: str, **changes) -> Result:
    fields = {
        "run": f"{task}-{model}",
        "task": task,
        "model": model,
        "head": HEADS[task],
        "provenance": origin(),
    }
    if task == "cost":
        fields["cost"] = COST[model] | {"images_per_s": 62.3, "peak_memory_mb": 410.0, "input_size": [3, 224, 224]}
    else:
        fields["data"] = {"name": "embedded", "root": "/data", "fingerprint": "f00d", **DATA[task]}
        fields["metrics"] = dict(METRICS[task])
        fields["details"] = {"per_class": {"disc": {"score": 0.75, "images": 12}, "box": {"score": 0.5, "images": 9}}}
    return Result(**(fields | changes))
