"""The named networks: one table of variants and ablations, `create_model`, and their registration in timm.

Source: EfficientVMamba, arXiv 2403.09977, table 1, with the widths of the published weights (S is 64, 128, 256, 512;
the paper's table prints those of B) and the ablations of tables 5 (scan), 6 (fusion) and 8 (layout).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg

from evmamba.blocks import SCANS, Scan
from evmamba.checkpoints import load_checkpoint
from evmamba.errors import UserError, unknown_name
from evmamba.model import EfficientVMamba, FeaturePyramid


@dataclass(frozen=True)
class Variant:
    """Sizes of a published network."""

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


VARIANTS = {
    "efficientvmamba_t": Variant(dims=(48, 96, 192, 384), depths=(2, 2, 4, 2)),
    "efficientvmamba_s": Variant(dims=(64, 128, 256, 512), depths=(2, 2, 4, 2)),
    "efficientvmamba_b": Variant(dims=(96, 192, 384, 768), depths=(2, 2, 9, 2)),
}

# Switches of the paper's ablations, their values, the published networks' first.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "scan": SCANS,
    "fusion": (True, False),
    "layout": ("EEII", "EEEE", "IIEE", "IIII"),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return sorted(VARIANTS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    features_only: bool = False,
    out_indices: int | Sequence[int] = (0, 1, 2, 3),
    scan: Scan = "es2d",
    fusion: bool = True,
    layout: str = "EEII",
    checkpoint_path: str | PathLike[str] | None = None,
    **unknown: Any,
) -> EfficientVMamba | FeaturePyramid:
    """Create a named network with fresh or loaded parameters.

    Args:
        name: one of :func:`list_models`.
        num_classes: outputs of the classifier; 0 ends at the pooled features.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth at the last block.
        drop_rate: dropout before the classifier.
        global_pool: `"avg"`, or `""` for none.
        features_only: a :class:`FeaturePyramid` in place of the classifier; `num_classes`, `drop_rate` and
            `global_pool` mean nothing to it.
        out_indices: stages whose maps the pyramid returns.
        scan, fusion, layout: the ablation switches (`ABLATIONS`).
        checkpoint_path: weights, see :func:`evmamba.load_checkpoint`.

    Raises:
        UserError: unknown name, option or value; a checkpoint that cannot be read or does not fit.
    """
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    if unknown:
        raise unknown_name("model option", next(iter(unknown)), _option_names())
    _check_switches(scan=scan, fusion=fusion, layout=layout)
    sizes = VARIANTS[name]
    model: EfficientVMamba | FeaturePyramid
    if features_only:
        model = FeaturePyramid(
            sizes.dims,
            sizes.depths,
            out_indices=out_indices,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            scan=scan,
            fusion=fusion,
            layout=layout,
        )
    else:
        model = EfficientVMamba(
            sizes.dims,
            sizes.depths,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            global_pool=global_pool,
            scan=scan,
            fusion=fusion,
            layout=layout,
        )
    model.variant = name
    model.pretrained_cfg = model.default_cfg = default_cfgs[name].default.to_dict()
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def _option_names() -> list[str]:
    return [name for name in inspect.signature(create_model).parameters if name not in ("name", "unknown")]


def _check_switches(**switches: Any) -> None:
    for switch, value in switches.items():
        if value not in ABLATIONS[switch]:
            raise unknown_name(switch, str(value), [str(valid) for valid in ABLATIONS[switch]])


default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "min_input_size": (3, 32, 32),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
            "license": "apache-2.0",
            "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
            "paper_ids": "arXiv:2403.09977",
        }
        for name in VARIANTS
    }
)


def _timm_entry(name: str, pretrained: bool, options: dict[str, Any]) -> EfficientVMamba | FeaturePyramid:
    """Create a model for `timm.create_model`, which adds options of its own bookkeeping."""
    if pretrained:
        raise UserError(
            f"no weights are hosted for {name}; take pretrained=False and load a file with evmamba.load_checkpoint or "
            "evmamba.create_model(..., checkpoint_path=...)"
        )
    cfg, overlay = options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None)
    options.pop("cache_dir", None)
    model = create_model(name, **options)
    model.pretrained_cfg = model.default_cfg = resolve_pretrained_cfg(name, cfg, overlay).to_dict()
    return model


@register_model
def efficientvmamba_t(pretrained: bool = False, **options: Any) -> EfficientVMamba | FeaturePyramid:
    """EfficientVMamba-T, 6.5 M parameters, 0.81 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_t", pretrained, options)


@register_model
def efficientvmamba_s(pretrained: bool = False, **options: Any) -> EfficientVMamba | FeaturePyramid:
    """EfficientVMamba-S, 11.3 M parameters, 1.34 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_s", pretrained, options)


@register_model
def efficientvmamba_b(pretrained: bool = False, **options: Any) -> EfficientVMamba | FeaturePyramid:
    """EfficientVMamba-B, 33.7 M parameters, 4.00 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_b", pretrained, options)
