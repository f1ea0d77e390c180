"""How the weights that are published under a name are evaluated: as timm's ``validate.py`` does."""

import timm
from timm.data import create_transform, resolve_data_config

from evmamba.errors import unknown_name
from evmamba.tasks.classification.data import ClassificationData
from evmamba.tasks.record import PublishedProtocol
from evmamba.variants import split_name


def published_protocol(backbone: str) -> PublishedProtocol:
    """Return the protocol of a network of ours or timm's, from timm's description of it.

    Raises:
        UserError: unknown network.
    """
    name = split_name(backbone)[0]
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if cfg is None:
        raise unknown_name("backbone", backbone, timm.list_models())
    found = resolve_data_config({}, pretrained_cfg=cfg.to_dict(), use_test_size=True)
    size = found["input_size"][-1]

    def apply(data: ClassificationData) -> None:
        data.eval_transform = create_transform(is_training=False, **found)

    mean, deviation = (", ".join(f"{value:g}" for value in found[key]) for key in ("mean", "std"))
    words = (
        f"{size} x {size}, {found['crop_mode']} crop of {found['crop_pct']:g}, {found['interpolation']}, mean {mean}, "
        f"deviation {deviation}"
    )
    return PublishedProtocol({"image_size": size, "crop_ratio": found["crop_pct"]}, apply, words)
