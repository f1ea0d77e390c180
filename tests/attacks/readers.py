"""The readers of strangers' files: a sound folder for each, which of its files are attacked, and how it is read."""

import dataclasses
import functools
import io
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from PIL import Image
from rich.console import Console

import evmamba
from evmamba.errors import printable
from evmamba.launch.cluster.jobs import JobBook, states
from evmamba.launch.cluster.settings import read_cluster
from evmamba.launch.fit.checkpoint_folders import read_whole
from evmamba.launch.fit.checkpoint_metadata import KEY, load_trained_network
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.resume import CONFIG_FILE, find_continuation, write_config
from evmamba.launch.fit.weights import WEIGHTS_FILE, load_weights
from evmamba.launch.report.build import print_table, report_from, write_report
from evmamba.launch.report.run_details import pictures
from evmamba.launch.store.progress import PROGRESS_FILE, read_progress, write_progress
from evmamba.launch.store.results import Result, read_result, write_result
from evmamba.launch.store.spec import RUNS_FOLDER, read_spec
from evmamba.launch.use.hub import pull
from evmamba.launch.use.predict_images import find_images
from evmamba.tasks.check import check_data
from evmamba.tasks.classification import ClassificationData, ClassificationModule
from evmamba.tasks.classification.packing import write_shards
from evmamba.tasks.data import TaskDataModule
from evmamba.tasks.detection import DetectionData
from evmamba.tasks.findings import print_findings
from evmamba.tasks.images import read_image
from evmamba.tasks.segmentation import SegmentationData
from evmamba.tasks.training.checkpoint_files import NEEDED, RUN_KEY, read_checkpoint

from ..launch.handmade import made_result, made_spec
from ..launch.tiny import write_images, write_recipe

TINY: dict[str, Any] = {"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
CONFIG: dict[str, Any] = {"trainer": {"max_steps": 2}, "model": {"init_args": {"backbone": "resnet18"}}, "data": {}}


@dataclass(frozen=True)
class Reader:
    """A reader of strangers' files.

    Attributes:
        build: writes a sound folder.
        read: reads it; AssertionError where what it returns is nonsense.
        files: the attacked files in it, as patterns.
        kind: "json", "yaml" or "torch": how the files are edited; None: only their bytes are.
        slow: takes longer than some hundredths of a second.
    """

    build: Callable[[Path], object]
    read: Callable[[Path], object]
    files: Sequence[str]
    kind: str | None = None
    slow: bool = False

    def targets(self, folder: Path) -> list[Path]:
        return sorted(path for pattern in self.files for path in folder.glob(pattern))


def quiet() -> Console:
    return Console(file=io.StringIO())


# Checkpoints.


def _checkpoint(folder: Path) -> None:
    content = dict.fromkeys(NEEDED, 0) | {
        "global_step": 2,
        RUN_KEY: {"ended": None},
        "state_dict": {"w": torch.ones(3)},
    }
    (folder / "checkpoints").mkdir()
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    write_config(folder, yaml.safe_dump(CONFIG))


def _read_checkpoint(folder: Path) -> object:
    path = folder / "checkpoints" / "last.ckpt"
    found = read_checkpoint(path) if path.exists() else None
    if found is not None:
        assert type(found.step) is int
        assert found.step >= 0
    return find_continuation(folder, CONFIG)


def _sharded(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"state_dict": {"w": torch.ones(300)}, "lr": 0.1}, checkpoint_id=folder / "last.ckpt", no_dist=True)
    torch.save({"global_step": 2, "loops": {}, RUN_KEY: {"ended": None}}, folder / "last.ckpt" / "meta.pt")


def _read_sharded(folder: Path) -> object:
    read_checkpoint(folder / "last.ckpt")
    whole = read_whole(folder / "last.ckpt")
    assert isinstance(whole["state_dict"]["w"], torch.Tensor)
    return whole


@functools.cache
def _network() -> evmamba.EfficientVMamba:
    return evmamba.EfficientVMamba(**TINY, num_classes=3)


def _weights(folder: Path) -> None:
    torch.save({"state_dict": _network().state_dict()}, folder / "net.pth")
    evmamba.save_checkpoint(_network(), folder / "net.safetensors")


def _read_weights(folder: Path) -> object:
    for name in ("net.pth", "net.safetensors"):
        evmamba.load_checkpoint(evmamba.EfficientVMamba(**TINY, num_classes=3), folder / name)
    return None


def _hub(folder: Path) -> None:
    _network().save_pretrained(folder / "net", config=TINY | {"num_classes": 3, "architecture": "EfficientVMamba"})


def _read_hub(folder: Path) -> object:
    return pull(str(folder / "net"), folder / "out.safetensors")


@functools.cache
def _module() -> ClassificationModule:
    return ClassificationModule(num_classes=2, backbone="resnet10t")


def _described(folder: Path) -> None:
    description = {
        "task": "classification",
        "model": {
            "class_path": "evmamba.tasks.classification.ClassificationModule",
            "init_args": {"backbone": "resnet10t", "label_smoothing": 0.1},
        },
        "data": {"class_path": "evmamba.tasks.classification.ClassificationData", "init_args": {"image_size": 32}},
        "class_names": ["ant", "bee"],
    }
    torch.save({KEY: description, "state_dict": _module().state_dict()}, folder / "best.ckpt")


def _read_described(folder: Path) -> object:
    found = load_trained_network(folder / "best.ckpt")
    assert all(name == printable(name) for name in found.class_names)
    return found


def _run_weights(folder: Path) -> None:
    safetensors.torch.save_file(_module().state_dict(), folder / WEIGHTS_FILE)


def _read_run_weights(folder: Path) -> object:
    return load_weights(ClassificationModule(num_classes=2, backbone="resnet10t"), folder)


# Runs and their reports.


def _full_result(folder: Path) -> Result:
    picture = folder / "gallery" / "0.jpg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(picture)
    result = made_result("classification", "resnet18", gallery=["gallery/0.jpg"])
    result.details["confusion"] = [[3, 1], [0, 5]]
    result.details["files"] = ["predictions.csv"]
    result.training = {
        "steps": 3, "epochs": 1, "images": 24, "images_per_s": 3.5, "curve": [[1, 2.0], [2, 1.5], [3, None]],
        "validation": [[2, {"top1": 0.5}], [3, {"top1": 0.75}]],
    }  # fmt: skip
    result.protocol = {"weights": "last epoch", "image_size": 32}
    result.provenance["config"] = {
        "trainer": {"max_epochs": 1}, "model": {"class_path": "m", "init_args": {"backbone": "resnet18"}},
        "data": {"init_args": {"image_size": 32}},
    }  # fmt: skip
    result.sweeps = {"input_size": [{"input_size": 32, "top1": 0.5}, {"input_size": 64, "top1": 0.6}]}
    return result


def _results(folder: Path) -> None:
    write_result(_full_result(folder / "one"), folder / "one")
    cost = made_result("cost", "resnet18", protocol={"input_size": [3, 224, 224]})
    points = [{"batch_size": size, "images_per_s": 3.0 * size, "peak_memory_mb": 5.0} for size in (1, 2)]
    cost.sweeps = {"batch_size": [*points, {"batch_size": 4, "failed": "out of memory"}]}
    write_result(cost, folder / "two")


def _read_results(folder: Path) -> object:
    table = report_from([folder])
    print_table(table, quiet())
    write_report(table, folder / "out")
    for row in table.rows:
        for part in row.cells:
            for cell in part:
                assert cell.value is None or math.isfinite(cell.value)
    return table


def _read_pictures(folder: Path) -> object:
    return pictures(read_result(folder / "one" / "result.json"))


def _read_one_result(folder: Path) -> object:
    found = [read_result(folder / name / "result.json") for name in ("one", "two")]
    report_from([folder])
    return found


def _spec(folder: Path) -> None:
    made_spec("classification").write(folder)


def _read_spec(folder: Path) -> object:
    spec = read_spec(folder / "spec.json")
    assert spec.name
    assert spec.hash
    return spec


def _runs(folder: Path) -> None:
    first, second = made_spec("cost"), made_spec("classification")
    for spec in (first, second):
        spec.write(folder / RUNS_FOLDER / spec.name)
    write_result(
        dataclasses.replace(made_result("cost", "resnet18"), run=first.name), folder / RUNS_FOLDER / first.name
    )
    write_progress(folder / RUNS_FOLDER / second.name, "training", 3, 10, 0.5)
    (folder / RUNS_FOLDER / second.name / "run.log").write_text("first\nlast words\n")
    book = JobBook(folder, {first.name: [1], second.name: [2, 3]}, [first.name, second.name], {"nodes": "1"})
    book.write()


def _read_runs(folder: Path) -> object:
    return [state.as_dict() for state in states(folder)]


def _progress(folder: Path) -> None:
    write_progress(folder, "training", 3, 10, 0.5)


def _read_progress(folder: Path) -> object:
    return read_progress(folder)  # what is damaged is no progress: it is replaced twice a second


def _cluster(folder: Path) -> None:
    document = {
        "account": "mine", "time": "24:00:00", "nodes": 2, "gpus_per_node": 8, "environment": ["module load cuda"],
        "sbatch": ["--exclusive"], "runs": {"classification": {"nodes": 4, "time": "2-00:00:00"}, "cost": {"mem": "0"}},
    }  # fmt: skip
    (folder / "cluster.yaml").write_text(yaml.safe_dump(document))


def _read_cluster(folder: Path) -> object:
    cluster = read_cluster(folder / "cluster.yaml", {})
    for job in cluster.jobs.values():
        assert type(job.nodes) is int
        assert job.time is None or isinstance(job.time, str)
    return cluster


def _recipe(folder: Path) -> None:
    write_recipe("classification", folder, folder / "recipe.yaml")


def _read_recipe(folder: Path) -> object:
    return settings_of(folder / "recipe.yaml")


# Data.


def _data(task: str) -> Callable[[Path], None]:
    return lambda folder: write_images(task, folder / "data")


def _shards(folder: Path) -> None:
    write_images("classification", folder / "folders")
    write_shards(folder / "folders", folder / "data", 10**9, 1)
    shutil.rmtree(folder / "folders")


def _yolo(folder: Path) -> None:
    write_images("detection", folder / "data")
    shutil.rmtree(folder / "data" / "annotations")
    for image in (folder / "data" / "images").rglob("*.png"):
        label = folder / "data" / "labels" / image.parent.name / f"{image.stem}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.4 0.4\n1 0.1 0.1 0.9 0.1 0.9 0.9\n")
    document = {"train": "images/train", "val": "images/val", "names": ["ant", "bee"]}
    (folder / "data" / "data.yaml").write_text(yaml.safe_dump(document))


def _masks(folder: Path) -> None:
    """COCO with all kinds of masks."""
    write_images("detection", folder / "data")
    for split in ("train", "val"):
        file = folder / "data" / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        for k, annotation in enumerate(document["annotations"]):
            polygon = {"segmentation": [[4.0, 4.0, 20.0, 4.0, 20.0, 20.0]]}
            counts = {"segmentation": {"size": [48, 48], "counts": [300, 4, 2000]}}
            rle = {"segmentation": {"size": [48, 48], "counts": "T94]0d2"}}  # ends below
            annotation |= (polygon, counts)[k % 2] if rle else {}
        file.write_text(json.dumps(document))


def _loaded(kind: type[TaskDataModule], **options: Any) -> Callable[[Path], object]:
    """Train-time reading of everything there is, and the check that is made before."""

    def read(folder: Path) -> object:
        root = folder / "data"
        findings = check_data(root, kind.task, 1, quiet())
        print_findings(findings, quiet())
        json.dumps(findings.as_json()).encode()
        data = kind(str(root), num_workers=0, batch_size=2, **options)
        data.setup("fit")
        data.description()
        assert all(name == printable(name) for name in data.class_names)
        for part in (data.train_set, data.val_set):
            for k in range(len(part)):  # type: ignore[arg-type]
                part[k]
        assert not findings.errors, "the training takes what the check refuses"
        return data

    return read


def _image(folder: Path) -> None:
    Image.new("RGB", (64, 48), (200, 10, 10)).save(folder / "0.jpg")


def _read_image(folder: Path) -> object:
    for path in find_images([folder / "0.jpg"]).values():
        assert read_image(path).mode == "RGB"
    return None


READERS: dict[str, Reader] = {
    "checkpoint of a training": Reader(_checkpoint, _read_checkpoint, ["checkpoints/last.ckpt"], "torch"),
    "configuration of a training": Reader(_checkpoint, _read_checkpoint, [CONFIG_FILE], "yaml"),
    "sharded checkpoint": Reader(_sharded, _read_sharded, ["last.ckpt/.metadata", "last.ckpt/*.distcp"]),
    "rest of a sharded checkpoint": Reader(_sharded, _read_sharded, ["last.ckpt/meta.pt"], "torch"),
    "weights, torch": Reader(_weights, _read_weights, ["net.pth"], "torch", slow=True),
    "weights, safetensors": Reader(_weights, _read_weights, ["net.safetensors"], slow=True),
    "weights of a run": Reader(_run_weights, _read_run_weights, [WEIGHTS_FILE], slow=True),
    "network of a checkpoint": Reader(_described, _read_described, ["best.ckpt"], "torch", slow=True),
    "network of the hub": Reader(_hub, _read_hub, ["net/config.json"], "json", slow=True),
    "weights of the hub": Reader(_hub, _read_hub, ["net/model.safetensors"], slow=True),
    "result": Reader(_results, _read_one_result, ["*/result.json"], "json"),
    "report": Reader(_results, _read_results, ["*/result.json"], "json", slow=True),
    "picture of a result": Reader(_results, _read_pictures, ["*/gallery/*"]),
    "spec": Reader(_spec, _read_spec, ["spec.json"], "json"),
    "folder of runs": Reader(_runs, _read_runs, ["runs/*/*.json", "jobs.json"], "json"),
    "log of a run": Reader(_runs, _read_runs, ["runs/*/run.log"]),
    "progress": Reader(_progress, _read_progress, [PROGRESS_FILE], "json"),
    "cluster": Reader(_cluster, _read_cluster, ["cluster.yaml"], "yaml"),
    "recipe": Reader(_recipe, _read_recipe, ["recipe.yaml"], "yaml", slow=True),
    "class folders": Reader(_data("classification"), _loaded(ClassificationData, image_size=32), ["data/*/*/*1.png"]),
    "shards": Reader(_shards, _loaded(ClassificationData, image_size=32), ["data/*/*.tar"]),
    "class names": Reader(_shards, _loaded(ClassificationData, image_size=32), ["data/classes.txt"]),
    "coco": Reader(_masks, _loaded(DetectionData, masks=True), ["data/annotations/*.json"], "json"),
    "coco images": Reader(_data("detection"), _loaded(DetectionData), ["data/images/*/*1.png"]),
    "yolo": Reader(_yolo, _loaded(DetectionData, masks=False), ["data/data.yaml"], "yaml"),
    "yolo labels": Reader(_yolo, _loaded(DetectionData, masks=False), ["data/labels/*/*1.txt"]),
    "masks": Reader(_data("segmentation"), _loaded(SegmentationData, crop_size=32), ["data/annotations/*/*1.png"]),
    "segmentation images": Reader(
        _data("segmentation"), _loaded(SegmentationData, crop_size=32), ["data/images/*/*1.png"]
    ),
    "segmentation classes": Reader(
        _data("segmentation"), _loaded(SegmentationData, crop_size=32), ["data/classes.txt"]
    ),
    "image": Reader(_image, _read_image, ["0.jpg"]),
}
