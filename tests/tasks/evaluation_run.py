"""Evaluate one checkpoint in several processes; the program that test_processes.py starts.

    python evaluation_run.py PROCESSES CHECKPOINT OUTPUT_FOLDER DATA_FOLDER...

Every rank writes ``rank<r>.json`` with the metrics that it holds for each data folder.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from evmamba.tasks.classification import ClassificationData, ClassificationModule
from evmamba.tasks.training.optim import ScheduleConfig

BACKBONE = "resnet10t"
CONSTANT = ScheduleConfig("constant")


def data_module(root: Path) -> ClassificationData:
    return ClassificationData(str(root), image_size=32, batch_size=2, num_workers=0)


def main(processes: int, checkpoint: Path, output: Path, roots: list[Path]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    held = {root.name: evaluate(processes, checkpoint, output, root) for root in roots}
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    (output / f"rank{rank}.json").write_text(json.dumps(held))


def evaluate(processes: int, checkpoint: Path, output: Path, root: Path) -> dict[str, Any]:
    data = data_module(root)
    module = ClassificationModule(BACKBONE, num_classes=data.num_classes, schedule=CONSTANT)
    module.load_state_dict(torch.load(checkpoint))
    options = {"accelerator": "cpu", "devices": processes, "logger": False, "enable_progress_bar": False}
    options |= {"strategy": "ddp" if processes > 1 else "auto", "use_distributed_sampler": False}
    options |= {"enable_checkpointing": False, "enable_model_summary": False, "default_root_dir": output}

    trainer = L.Trainer(**options)
    trainer.validate(module, data, verbose=False)
    held = numbers(trainer)
    trainer.test(module, data, verbose=False)
    held |= numbers(trainer) | {"confusion": module.evaluation.details["confusion"]}
    if module.evaluation.files:  # the first process's
        module.evaluation.write(output / root.name)

    # Training validates too, there through DDP's wrapper: it must neither hang nor differ between ranks.
    trainer = L.Trainer(**options, max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(module, data)
    return held | {"after training": numbers(trainer)["val/loss"]}


def numbers(trainer: L.Trainer) -> dict[str, float]:
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
