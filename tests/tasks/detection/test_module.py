"""The whole module: metrics that do not depend on the number of processes, files, pictures, refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.detection import DetectionData, DetectionModule
from evmamba.tasks.gallery import Gallery
from evmamba.tasks.training.optim import OptimizerConfig, ScheduleConfig

from .evaluation_run import module
from .handmade import CATEGORIES, box, coco_images, write_coco
from .test_metrics import plain_coco_stats

CONSTANT = ScheduleConfig("constant")


def trainer(folder: Path, **options: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "use_distributed_sampler": False, "default_root_dir": folder}
    return L.Trainer(**(quiet | options))


class Oracle(torch.nn.Module):
    """Answers with the truth of the image that it is shown; images are told apart by their pixels."""

    def __init__(self, data: DetectionData) -> None:
        super().__init__()
        self.truth = [(image, target) for image, target, _ in (data.val_set[k] for k in range(5))]

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = next(target for known, target in self.truth if torch.equal(known, images[0]))
        scores = torch.ones(len(found["boxes"]))
        return [
            {"boxes": found["boxes"], "labels": found["labels"] + 1, "scores": scores, "masks": found["masks"][:, None]}
        ]


def evaluate(processes: tuple[int, ...], root: Path, checkpoint: Path, output: Path) -> dict[int, list[dict]]:
    """Run the program; return for each number of processes what its ranks hold."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC"))}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).with_name("evaluation_run.py")
    command = [sys.executable, *map(str, (program, root, checkpoint, output, *processes))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return {n: [json.loads((output / f"run{n}" / f"rank{r}.json").read_text()) for r in range(n)] for n in processes}


@pytest.mark.slow
@pytest.mark.parametrize(("val_images", "processes"), [(5, (3, 2, 1)), (2, (3, 1))])
def test_metrics_do_not_depend_on_the_number_of_processes(
    coco: Path, tmp_path: Path, val_images: int, processes: tuple[int, ...]
) -> None:
    """Five images over 1, 2 and 3 processes; two over 3, where a rank has nothing to do."""
    images = coco_images(val_images, 101)
    boxes = [box(10 * i["id"] + k, i["id"], CATEGORIES[k]["id"], [30 * k, 8, 29, 50]) for i in images for k in range(3)]
    file = write_coco(coco, "val", images, boxes)
    torch.manual_seed(0)
    checkpoint = tmp_path / "weights.pt"
    torch.save(module(3).state_dict(), checkpoint)
    runs = evaluate(processes, coco, checkpoint, tmp_path)
    alone = runs[1][0]
    assert alone["details"]["images"] == val_images
    assert alone["details"]["detections"] == 100 * val_images
    assert alone["metrics"]["test/AP50"] > 0
    for n, ranks in runs.items():
        assert all(held == alone for held in ranks)
        for name, iou_type in (("detections.json", "bbox"), ("detections_masks.json", "segm")):
            written = tmp_path / f"run{n}" / name
            assert written.read_bytes() == (tmp_path / "run1" / name).read_bytes()
            stats = plain_coco_stats(file, written, iou_type)
            assert stats == alone["details"]["coco_stats" if iou_type == "bbox" else "coco_mask_stats"]


def test_truth_as_prediction_scores_one(coco: Path, tmp_path: Path) -> None:
    """Label offsets, category ids with gaps, coordinates and masks all come back as they went in."""
    data = DetectionData(str(coco), num_workers=0, masks=True)
    data.setup("test")
    detection = module(3)
    detection.detector = Oracle(data)
    detection.gallery = Gallery(2)
    (metrics,) = trainer(tmp_path).test(detection, data, verbose=False)
    for name in ("AP", "AP50", "AP75", "mask_AP"):
        assert metrics[f"test/{name}"] == pytest.approx(1.0)
    assert list(detection.evaluation.details["per_class"]) == ["square", "disc", "bar"]
    assert detection.evaluation.details["per_class"]["disc"]["mask_AP"] == pytest.approx(1.0)
    assert detection.evaluation.metrics["AP"] == detection.evaluation.details["coco_stats"][0]
    assert detection.evaluation.write(tmp_path / "output") == ["gallery/000.jpg", "gallery/001.jpg"]
    entries = json.loads((tmp_path / "output" / "detections.json").read_text())
    assert {entry["category_id"] for entry in entries} == {3, 7, 90}
    pictures = sorted((tmp_path / "output" / "gallery").iterdir())
    assert [picture.name for picture in pictures] == ["000.jpg", "001.jpg"]
    assert Image.open(pictures[0]).width > 640


def test_partial_evaluation_is_said(coco: Path, tmp_path: Path) -> None:
    data = DetectionData(str(coco), num_workers=0, masks=True)
    data.setup("test")
    detection = module(3)
    detection.detector = Oracle(data)
    with pytest.warns(UserWarning, match="AP is over 2 of the 5 images"):
        (metrics,) = trainer(tmp_path, limit_test_batches=2).test(detection, data, verbose=False)
    assert metrics["test/AP"] == pytest.approx(1.0)
    assert (detection.evaluation.details["images"], detection.evaluation.details["images_in_file"]) == (2, 5)


def test_maskrcnn_is_refused_before_training_where_there_are_no_masks(coco: Path, tmp_path: Path) -> None:
    images = coco_images(2)
    write_coco(coco, "train", images, [box(1, 1, 3, [5, 5, 40, 40], segmentation=[])])
    with pytest.raises(UserError, match=r"instances_train.json holds no masks.*fasterrcnn or retinanet"):
        trainer(tmp_path).fit(module(3), DetectionData(str(coco), num_workers=0))


def test_a_loss_that_is_not_finite_stops_with_the_files_named(coco: Path, tmp_path: Path) -> None:
    detection = DetectionModule(3, "resnet10t", min_size=(64,), max_size=96, channels=8, schedule=CONSTANT)
    with torch.no_grad():
        detection.detector.head.regression_head.bbox_reg.bias.fill_(float("nan"))
    data = DetectionData(str(coco), batch_size=4, num_workers=0)
    with pytest.raises(UserError, match=r"loss is nan at optimizer step 0 .*0001.jpg"):
        trainer(tmp_path, enable_checkpointing=False, num_sanity_val_steps=0).fit(detection, data)


def test_fit_and_test_on_real_images(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Two steps of Mask R-CNN on photographs with crowds and gaps; every val image is evaluated."""
    data = DetectionData(str(real_data("det_coco")), batch_size=2, num_workers=0)
    detection = DetectionModule(
        data.num_classes,
        "efficientvmamba_t",
        "maskrcnn",
        min_size=(64, 96),
        max_size=128,
        channels=16,
        anchor_scale=0.25,
        optimizer=OptimizerConfig(lr=1e-4),
        schedule=CONSTANT,
    )
    trainer(tmp_path, max_steps=2, limit_val_batches=0, enable_checkpointing=False).fit(detection, data)
    (metrics,) = trainer(tmp_path).test(detection, data, verbose=False)
    assert 0 <= metrics["test/AP"] <= metrics["test/AP50"] < 0.2
    assert detection.evaluation.details["images"] == detection.evaluation.details["images_in_file"] == 42
    assert len(detection.evaluation.details["per_class"]) == 80


def test_a_checkpoint_is_not_measured_by_rules_that_it_was_not_trained_by(coco: Path, tmp_path: Path) -> None:
    """Checkpoints from before there was a choice are torchvision's."""
    small = {"min_size": (64,), "max_size": 96, "channels": 8, "schedule": CONSTANT}
    theirs = DetectionModule(3, "resnet10t", rules="torchvision", **small)
    data = DetectionData(str(coco), num_workers=0)
    fitting = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fitting.fit(theirs, data)
    new, old = tmp_path / "new.ckpt", tmp_path / "old.ckpt"
    fitting.save_checkpoint(new)
    content = torch.load(new, weights_only=True)
    del content["detection_rules"]
    torch.save(content, old)
    ours = DetectionModule(3, "resnet10t", **small)
    for checkpoint in (new, old):
        trainer(tmp_path, limit_test_batches=1).test(theirs, data, ckpt_path=checkpoint, verbose=False)
        with pytest.raises(UserError, match=r"trained by torchvision's rules.*rules=torchvision"):
            trainer(tmp_path).test(ours, data, ckpt_path=checkpoint, verbose=False)
