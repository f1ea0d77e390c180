"""Backbones by name for every task: EfficientVMamba's variants, its peers on the same kernels, or any timm model."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HTTPError
from timm.models import group_parameters
from torch import nn

import evmamba
from evmamba.checkpoints import read_file
from evmamba.errors import UserError, first_line, unknown_name
from evmamba.pretrained import WEIGHTS, Source, fetch, parse_source, published_source, source_of_cfg
from evmamba.tasks import TASKS
from evmamba.tasks.own_modules import import_own
from evmamba.tasks.training.depth import classifier_of
from evmamba.variants import split_name

STRIDES = (4, 8, 16, 32)
PRETRAINED = "pretrained"  # in place of a checkpoint: the weights published under the backbone's name

# Some timm families fix the input size unless told otherwise; the first set of options that a model accepts is used.
FLEXIBLE_SIZE_OPTIONS: tuple[dict[str, Any], ...] = (
    {"strict_img_size": False},
    {"dynamic_img_size": True},
    {},
)
# What timm's models raise for options that they do not have.
CANNOT_BUILD = (TypeError, AssertionError, IndexError, ValueError, RuntimeError, AttributeError)


class TimmPyramid(nn.Module):
    """A timm ``features_only`` network whose maps are always NCHW.

    ``forward``: images [B, in_chans, H, W] -> list of [B, C_i, h_i, w_i], finest first. ``feature_info`` is timm's.
    """

    def __init__(self, body: nn.Module, channels_last: bool, name: str) -> None:
        super().__init__()
        self.body = body
        self.name = name
        self.feature_info: Any = body.feature_info
        self.channels_last = channels_last

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = self.body(x)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else maps

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Layer of a parameter by its name (timm's convention): that of the whole network, which timm does not keep."""
        with torch.random.fork_rng(devices=[]):
            whole: Any = timm.create_model(self.name)
        layers = group_parameters(whole, whole.group_matcher(coarse=coarse), reverse=True)
        # timm may have flattened the network: stages.0.blocks is stages_0.blocks here, and may be inside of "model".
        flat = {name.replace(".", "_"): layer for name, layer in layers.items()}
        return lambda name: flat.get(name.removeprefix("body.").removeprefix("model.").replace(".", "_"), math.inf)


def build_backbone(
    name: str,
    *,
    features_only: bool,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    num_classes: int = 0,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    checkpoint: str | None = None,
) -> nn.Module:
    """Build one of our models or any timm model by name.

    Args:
        name: a name of ``evmamba.list_models()``, with tags of ablations or without, or of ``timm.list_models()``; or
            ``module:name``, a model that importing ``module`` (from the working directory, say) registers in timm.
        features_only: True for a feature pyramid: forward returns a list of NCHW maps and the module has
            ``feature_info.channels()`` and ``feature_info.reduction()``; False for a classifier.
        out_indices: levels of the pyramid, 0..3 for strides 4, 8, 16, 32, whatever the model's own numbering is.
        num_classes: outputs of the classifier.
        in_chans: input channels.
        drop_path_rate: stochastic depth.
        checkpoint: backbone weights: a file, a URL or a repository of the hub (see `evmamba.pretrained`), or
            "pretrained" for those that are published under the name; None for random initialisation.

    Raises:
        UserError: unknown name (the nearest ones are offered), weights that are missing, unfitting or cannot be
            fetched, a model without maps at the four strides, or one that has no stochastic depth although some is
            asked for.
    """
    if checkpoint is not None and checkpoint != PRETRAINED:
        checkpoint = str(fetch(parse_source(checkpoint)))
        if not Path(checkpoint).is_file():
            raise UserError(f"checkpoint not found: {checkpoint}")
    if ":" in name:
        module, name = name.split(":", 1)
        import_own(module, "a backbone 'module:name' needs it")
    ours = evmamba.list_models()
    if split_name(name)[0] in ours:
        return evmamba.create_model(
            name,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            features_only=features_only,
            out_indices=tuple(out_indices),
            pretrained=True if checkpoint == PRETRAINED else checkpoint or False,
        )
    if not timm.is_model(name.split(".")[0]):
        raise unknown_name("backbone", name, [*ours, *timm.list_models()])

    options: dict[str, Any] = {"in_chans": in_chans}
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    if not features_only:
        return _create_timm(name, options | {"num_classes": num_classes}, checkpoint)

    # Counted from the last level: many networks have a stride-2 level first.
    options |= {"features_only": True, "out_indices": tuple(i - 4 for i in out_indices)}
    body = _create_timm(name, options, checkpoint)
    info: Any = body.feature_info
    reductions = list(info.reduction())
    wanted = [STRIDES[i] for i in out_indices]
    if reductions != wanted:
        raise UserError(
            f"backbone '{name}' has feature maps at strides {reductions}, not {wanted}; "
            "detection and segmentation need a network with four stages (not a plain ViT)"
        )
    return TimmPyramid(body, channels_last=_is_channels_last(body), name=name)


def published_weights(name: str) -> Source:
    """Where the weights are that are published under a backbone's name, ours or timm's.

    Raises:
        UserError: there are none.
    """
    if split_name(name)[0] in evmamba.list_models():
        return published_source(name)
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if cfg is None or (source := source_of_cfg(cfg.to_dict())) is None:
        raise UserError(f"no published weights are known for {name}; give their source")
    return source


def _create_timm(name: str, options: dict[str, Any], checkpoint: str | None) -> nn.Module:
    """A timm model, with the weights of a file if one is given, through timm's own loader: it knows how to adapt the
    first convolution and to leave out another classifier. A file of which nothing fits is refused: timm says nothing.
    """
    if checkpoint is None:
        return _create_flexible(name, options)
    if checkpoint == PRETRAINED:
        try:
            return _create_flexible(name, options | {"pretrained": True})
        except (HTTPError, OSError) as error:
            raise UserError(f"cannot fetch the published weights of '{name}': {first_line(error)}") from error
    with torch.random.fork_rng(devices=[]):
        fresh = _create_flexible(name, options)
    own = _weights_of_training(checkpoint)
    overlay: dict[str, Any] = {"file": checkpoint, "state_dict": own}  # the second one first
    if _has_classifier_of(fresh, checkpoint, own):
        overlay["num_classes"] = options["num_classes"]  # timm takes it for the published one, of other classes
    loaded = _create_flexible(name, options | {"pretrained": True, "pretrained_cfg_overlay": overlay})
    if all(torch.equal(a, b) for a, b in zip(fresh.parameters(), loaded.parameters(), strict=True)):
        raise UserError(f"nothing in {checkpoint} fits backbone '{name}'")
    return loaded


def _weights_of_training(checkpoint: str) -> dict[str, Any] | None:
    """The network's own weights, if a training left the file whose network others start from."""
    if Path(checkpoint).suffix not in (".ckpt", ".safetensors"):
        return None
    content = read_file(Path(checkpoint))
    weights = content.get("state_dict", content)
    for task in TASKS.values():
        prefix = f"{task.backbone_at}."
        if TASKS.starts_others(task.name) and any(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return None


def _has_classifier_of(network: nn.Module, checkpoint: str, own: Mapping[str, Any] | None) -> bool:
    """Whether a file (or what is known of it already) has a classifier for as many classes as the network's."""
    names = classifier_of(network)
    if not names or (own is None and Path(checkpoint).suffix not in WEIGHTS):
        return False
    content = read_file(Path(checkpoint)) if own is None else own
    parts = [content, *(value for value in content.values() if isinstance(value, Mapping))]
    shapes = {name: getattr(value, "shape", None) for part in parts for name, value in part.items()}
    return all(shapes.get(name) == network.get_parameter(name).shape for name in names)


def _create_flexible(name: str, options: dict[str, Any]) -> nn.Module:
    """``timm.create_model`` with flexible input size where the family has it, and its complaints as UserError."""
    complaint: Exception | None = None
    for flexible in FLEXIBLE_SIZE_OPTIONS:
        try:
            return timm.create_model(name, **options, **flexible)
        except CANNOT_BUILD as error:
            complaint = error  # the last one, without extra options, is the one that counts
    strides = _strides(name) if "out_indices" in options else STRIDES
    few = f"it has feature maps at strides {list(strides)} only; detection and segmentation need {list(STRIDES)}"
    reason = few if len(strides) < len(STRIDES) else str(complaint).strip().split("\n")[0]
    raise UserError(f"timm cannot build backbone '{name}' with {_shown(options)}: {reason}") from complaint


def _strides(name: str) -> Sequence[int]:
    """Of all feature maps of a timm model; STRIDES of one that has none to tell."""
    try:
        return timm.create_model(name, features_only=True).feature_info.reduction()
    except CANNOT_BUILD:
        return STRIDES


def _shown(options: dict[str, Any]) -> str:
    overlay = options.get("pretrained_cfg_overlay", {})
    shown = {key: value for key, value in options.items() if key not in ("pretrained", "pretrained_cfg_overlay")}
    if options.get("pretrained"):
        shown["checkpoint"] = overlay.get("file", PRETRAINED)
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _is_channels_last(body: nn.Module) -> bool:
    """Whether the maps come as NHWC (timm says so in ``output_fmt``)."""
    layout = getattr(body, "output_fmt", None)
    return str(getattr(layout, "value", layout)).upper() == "NHWC"
