"""Evaluate one checkpoint in several processes; a program for test_module.py, which reads what it writes.

    python evaluation_run.py DATA_FOLDER CHECKPOINT OUTPUT_FOLDER PROCESSES...

Every rank writes ``run<processes>/rank<r>.json`` with the metrics and details it holds; rank 0 also the detections.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import cast

import lightning as L
import torch

from evmamba.tasks.detection import DetectionData, DetectionModule


def module(num_classes: int) -> DetectionModule:
    """Small, and talkative: random weights give a hundred detections an image."""
    return DetectionModule(
        num_classes,
        "resnet10t",
        "maskrcnn",
        min_size=(64,),
        max_size=96,
        channels=8,
        anchor_scale=0.5,
        score_threshold=0.0,
    )


class WriteWhatThisRankHolds(L.Callback):
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        detection = cast(DetectionModule, pl_module)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        file = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.json"
        file.write_text(json.dumps({"metrics": metrics, "details": detection.evaluation.details}))
        if trainer.is_global_zero:
            detection.evaluation.write(Path(trainer.default_root_dir))


def evaluate(processes: int, root: Path, checkpoint: Path, output: Path) -> None:
    output.mkdir()
    data = DetectionData(str(root), num_workers=0)
    detection = module(data.num_classes)
    detection.load_state_dict(torch.load(checkpoint))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",  # forked ranks need not import everything again
        use_distributed_sampler=False,
        callbacks=WriteWhatThisRankHolds(),
        logger=False,
        enable_progress_bar=False,
        default_root_dir=output,
    )
    trainer.test(detection, data, verbose=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder, weights, target = map(Path, sys.argv[1:4])
    for count in map(int, sys.argv[4:]):
        evaluate(count, folder, weights, target / f"run{count}")
