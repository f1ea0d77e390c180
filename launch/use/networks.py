"""The network to export or publish: of a checkpoint that describes itself, or of a backbone's name with or without
weights."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from evmamba.errors import UserError
from evmamba.launch.fit.checkpoint_metadata import load_trained_network
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import build_backbone


@dataclass
class Network:
    """A network, and what users of it have to know.

    Attributes:
        model: takes normalised images [B, 3, H, W].
        outputs: what comes out, in words.
        class_names: of its outputs; empty where it has no classes.
        trained: False where the parameters are random.
    """

    model: nn.Module
    outputs: str
    class_names: list[str]
    trained: bool


def find_network(source: str, weights: Path | None = None, backbone_only: bool = False) -> Network:
    """Load a network.

    Args:
        source: a checkpoint of `evmamba fit` or `bench`, or the name of a backbone (ours or timm's).
        weights: a file with weights, for a backbone given by name.
        backbone_only: the feature pyramid in place of the whole network.

    Raises:
        UserError: neither file nor name, a checkpoint without description, a task whose networks are not
            exported as a whole.
    """
    if not Path(source).is_file():
        if Path(source).suffix in (".ckpt", ".pth", ".pt", ".safetensors"):
            raise UserError(f"no checkpoint file at {source}")
        model = build_backbone(
            source,
            features_only=backbone_only,
            num_classes=1000,
            checkpoint=None if weights is None else str(weights),
        )
        return Network(model, "feature maps" if backbone_only else "logits", [], weights is not None)
    if weights is not None:
        raise UserError(f"{source} holds weights already; --weights is for a backbone given by its name")
    trained = load_trained_network(Path(source))
    task = TASKS[trained.task]
    if backbone_only and task.pyramid:
        return Network(trained.module.get_submodule(task.backbone_at), "feature maps", [], True)
    if backbone_only:
        pyramid = build_backbone(trained.backbone, features_only=True, checkpoint=source)
        return Network(pyramid, "feature maps", [], True)
    if task.network_at is None:
        raise UserError(
            f"a whole network of {task.name} is not exported ({task.outputs}); --backbone takes its feature pyramid"
        )
    return Network(trained.module.get_submodule(task.network_at), task.outputs, trained.class_names, True)
