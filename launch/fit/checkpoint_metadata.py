"""Checkpoints that say what they are: which network, which classes, which input; and the network back from one.

Every checkpoint of a training holds, under `KEY`, plain values: the task, the model's and the data's configuration and
the class names. So a checkpoint alone is enough to predict, explain, export or publish.
"""

import copy
import json
import pydoc
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from evmamba.checkpoints import read_file
from evmamba.errors import UserError
from evmamba.launch.fit.recipe_imports import limit_imports
from evmamba.tasks import TASKS
from evmamba.tasks.module import TaskModule
from evmamba.tasks.trust import check_backbone, check_trusted

KEY = "evmamba"


class CheckpointMetadata(Callback):
    """Puts the description into every checkpoint.

    Args:
        config: the run's configuration as plain lists and mappings.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        description = {
            "version": metadata.version("evmamba"),
            "task": pl_module.task,
            "model": self.config["model"],
            "data": self.config["data"],
            "class_names": list(trainer.datamodule.class_names),  # type: ignore[attr-defined]
        }
        # Through JSON, so that nothing but plain values gets in, which torch.load reads with weights_only.
        checkpoint[KEY] = json.loads(json.dumps(description, default=str))


@dataclass
class TrainedNetwork:
    """What a checkpoint describes.

    Attributes:
        task: its name.
        module: with the checkpoint's weights (the averaged ones if there are any), in evaluation mode, on the CPU.
        class_names: of the data it was trained on.
        data: the data module's arguments.
        backbone: the backbone's name.
    """

    task: str
    module: TaskModule
    class_names: list[str]
    data: dict[str, Any]
    backbone: str


def load_trained_network(path: Path) -> TrainedNetwork:
    """Build the network of a checkpoint that `evmamba fit` or `evmamba bench` wrote, with its weights.

    Raises:
        UserError: no such file, torn, or a checkpoint without description (weights alone, other projects').
    """
    content = read_file(Path(path))
    description = content.get(KEY)
    if not isinstance(description, dict) or "state_dict" not in content:
        raise UserError(
            f"{path} does not say which network it is of: only checkpoints that `evmamba fit` or `evmamba bench` wrote "
            "do (last.ckpt, best.ckpt); weights alone are loaded with evmamba.load_checkpoint"
        )
    config = copy.deepcopy(description["model"])
    TASKS.find()
    check_trusted(config["class_path"], f"the checkpoint {path}")
    arguments = config["init_args"]
    arguments |= {k: v for k, v in _earlier_options(config["class_path"]).items() if k not in arguments}
    check_backbone(str(arguments.get("backbone")), f"the checkpoint {path}")
    arguments["num_classes"] = len(description["class_names"])
    arguments["checkpoint"] = None  # what it once started from
    limit_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskModule, "model", instantiate=True)
    module: TaskModule = parser.instantiate_classes(parser.parse_object({"model": config})).model
    module.load_state_dict(content["state_dict"])
    module.eval()
    return TrainedNetwork(
        description["task"],
        module,
        description["class_names"],
        description["data"].get("init_args", {}),
        arguments["backbone"],
    )


def _earlier_options(class_path: str) -> dict[str, Any]:
    return getattr(pydoc.locate(class_path), "earlier_options", {})
