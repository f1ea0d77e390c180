"""The weights that a training ends with, as files that other runs and other projects read.

``weights.safetensors`` holds the whole module as it was tested (averaged weights where the recipe averages), under its
own names; a task that others start from (classification) also leaves ``backbone.safetensors``, its network alone,
which `build_backbone` (ours or timm's) and `evmamba.load_checkpoint` take. Both appear whole or not at all, and only
after the last training step, so a run that finds them may start. To continue a training is another matter:
``last.ckpt``.
"""

from pathlib import Path

import evmamba
from evmamba.backbone import Backbone
from evmamba.checkpoints import check_fit, read_file, write_safetensors
from evmamba.errors import UserError
from evmamba.tasks import TASKS
from evmamba.tasks.module import TaskModule

WEIGHTS_FILE = "weights.safetensors"
BACKBONE_FILE = "backbone.safetensors"


def save_weights(module: TaskModule, folder: Path) -> None:
    """Write the files; call it on one process, after training.

    Raises:
        UserError: the folder cannot be written.
    """
    if TASKS.starts_others(module.task):
        network = module.get_submodule(TASKS[module.task].backbone_at)
        if isinstance(network, Backbone):
            evmamba.save_checkpoint(network, folder / BACKBONE_FILE)
        else:
            write_safetensors(network.state_dict(), folder / BACKBONE_FILE)
    # Last: who finds it finds the other one too.
    write_safetensors(module.state_dict(), folder / WEIGHTS_FILE)


def load_weights(module: TaskModule, folder: Path) -> None:
    """Read ``weights.safetensors`` of a run's folder into the same kind of module.

    Raises:
        UserError: there is no such file, it is torn, or it belongs to another model.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"no {WEIGHTS_FILE} in {folder}: its training has not finished")
    weights = read_file(path)
    check_fit(weights, module.state_dict(), str(path))
    module.load_state_dict(weights)
