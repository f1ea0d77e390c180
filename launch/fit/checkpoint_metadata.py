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
from typing import Annotated, Any

import lightning as L
import msgspec
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from evmamba.checkpoints import read_file
from evmamba.errors import UserError, first_line, printable
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
            "epochs": trainer.max_epochs,
        }
        # Through JSON, so that nothing but plain values gets in, which torch.load reads with weights_only.
        checkpoint[KEY] = json.loads(json.dumps(description, default=str))


@dataclass
class TrainedNetwork:
    """What a checkpoint describes.

    Attributes:
        task: its name.
        model: class path and arguments of the module.
        module: with the checkpoint's weights (the averaged ones if there are any), in evaluation mode, on the CPU.
        class_names: of the data it was trained on.
        data: the data module's arguments.
        backbone: the backbone's name.
        epochs: how many the whole training was to have; None or -1 where that is not known.
    """

    task: str
    model: dict[str, Any]
    module: TaskModule
    class_names: list[str]
    data: dict[str, Any]
    backbone: str
    epochs: int | None


def load_trained_network(path: Path) -> TrainedNetwork:
    """Build the network of a checkpoint that `evmamba fit` or `evmamba bench` wrote, with its weights.

    Raises:
        UserError: no such file, torn, or a checkpoint without description (weights alone, other projects').
    """
    content = read_file(Path(path))
    weights = content.get("state_dict")
    if not isinstance(content.get(KEY), dict) or not isinstance(weights, dict):
        raise UserError(
            f"{path} does not say which network it is of: only checkpoints that `evmamba fit` or `evmamba bench` wrote "
            "do (last.ckpt, best.ckpt); weights alone are loaded with evmamba.load_checkpoint"
        )
    try:
        description = msgspec.convert(content[KEY], _Description)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: what it says of its network is damaged ({error})") from error
    class_path, arguments = description.model.class_path, copy.deepcopy(description.model.init_args)
    TASKS.find()
    check_trusted(class_path, f"the checkpoint {path}")
    arguments |= {k: v for k, v in _earlier_options(class_path).items() if k not in arguments}
    check_backbone(str(arguments.get("backbone")), f"the checkpoint {path}")
    arguments["num_classes"] = len(description.class_names)
    arguments["checkpoint"] = None  # what it once started from
    with torch.device("meta"):  # without memory: options of strangers may ask for any amount
        shapes = _built(path, class_path, arguments)
    if shapes.task != description.task:
        raise UserError(f"{path} says it is of {description.task}, but its network is of {shapes.task}")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise UserError(f"{path}: its state_dict holds more than tensors by their names")
    load_weights(path, shapes, {name: torch.empty_like(value, device="meta") for name, value in weights.items()})
    module = _built(path, class_path, arguments)
    load_weights(path, module, weights)
    module.eval()
    return TrainedNetwork(
        description.task,
        {"class_path": class_path, "init_args": arguments},
        module,
        [printable(name) for name in description.class_names],
        description.data.init_args,
        str(arguments.get("backbone")),
        description.epochs,
    )


def _built(path: Path, class_path: str, arguments: dict[str, Any]) -> TaskModule:
    limit_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TaskModule, "model", instantiate=True)
    config = {"model": {"class_path": class_path, "init_args": arguments}}
    try:
        module: TaskModule = parser.instantiate_classes(parser.parse_object(config)).model
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # of a stranger's options anything may come: a wrong type, a network too large to hold
        raise UserError(f"{path}: the network that it describes cannot be built ({first_line(error)})") from error
    return module


def load_weights(path: Path, module: TaskModule, weights: dict[str, Any]) -> None:
    """Load a checkpoint's weights into a network.

    Raises:
        UserError: they do not fit; names the checkpoint, `path`.
    """
    try:
        module.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (RuntimeError, TypeError, AttributeError) as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[1:2]) or first_line(error)
        raise UserError(f"{path}: its weights do not fit the network that it describes ({said})") from error


class _Part(msgspec.Struct):
    class_path: str = ""
    init_args: dict[str, Any] = {}


class _Description(msgspec.Struct):
    """What `CheckpointMetadata` writes."""

    task: str
    model: _Part
    data: _Part
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    epochs: int | None = None


def _earlier_options(class_path: str) -> dict[str, Any]:
    return getattr(pydoc.locate(class_path), "earlier_options", {})
