"""The named networks: one table of variants, peers and ablations, `create_model`, and their registration in timm.

Source: EfficientVMamba, arXiv 2403.09977, table 1, with the widths of the published weights (S is 64, 128, 256, 512;
the paper's table prints those of B) and the ablations of tables 5 (scan), 6 (fusion) and 8 (layout); the atrous step is
its section 4.1's parameter p.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg

from evmamba.blocks import Scan
from evmamba.checkpoints import load_checkpoint
from evmamba.errors import UserError, unknown_name
from evmamba.model import EfficientVMamba, FeaturePyramid
from evmamba.peers.vim import Vim, VimPyramid
from evmamba.peers.vmamba import VMamba, VMambaPyramid

Network = EfficientVMamba | FeaturePyramid | Vim | VimPyramid


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

# Networks of others on the same kernels: classifier and feature pyramid.
PEERS: dict[str, tuple[type[VMamba] | type[Vim], type[VMambaPyramid] | type[VimPyramid]]] = {
    "vmamba_tiny": (VMamba, VMambaPyramid),
    "vim_tiny": (Vim, VimPyramid),
}

# Switches of the paper's ablations, their values, the published networks' first.
ABLATIONS: dict[str, tuple[Any, ...]] = {
    "scan": ("es2d", "ss2d"),
    "fusion": (True, False),
    "layout": ("EEII", "EEEE", "IIEE", "IIII"),
    "step": (2, 1, 4),
}

# How an ablated network is named where only a name can be given: "efficientvmamba_t-ss2d-nofusion".
TAGS: dict[str, tuple[str, Any]] = {
    "ss2d": ("scan", "ss2d"),
    "nofusion": ("fusion", False),
    "eeee": ("layout", "EEEE"),
    "iiee": ("layout", "IIEE"),
    "iiii": ("layout", "IIII"),
    "step1": ("step", 1),
    "step4": ("step", 4),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, without those of ablated networks (`TAGS`)."""
    return sorted([*VARIANTS, *PEERS])


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """Split a name in that of the published network and the switches its tags set: `("efficientvmamba_t", {...})`.

    Names of other networks come back as they are. Raises UserError for tags that do not exist or contradict each other.
    """
    base, *tags = name.split("-")
    if base not in VARIANTS:
        return name, {}
    switches: dict[str, Any] = {}
    for tag in tags:
        if tag not in TAGS:
            raise unknown_name(f"tag of {base}", tag, TAGS)
        switch, value = TAGS[tag]
        if switch in switches:
            raise UserError(f"'{name}' sets {switch} twice")
        switches[switch] = value
    return base, switches


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
    step: int = 2,
    checkpoint_path: str | PathLike[str] | None = None,
    **unknown: Any,
) -> Network:
    """Create a named network with fresh or loaded parameters.

    Args:
        name: one of :func:`list_models`; EfficientVMamba's may end with tags that set ablation switches (`TAGS`).
        num_classes: outputs of the classifier; 0 ends at the pooled features.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth at the last block.
        drop_rate: dropout before the classifier.
        global_pool: `"avg"`, or `""` for none.
        features_only: a :class:`FeaturePyramid` in place of the classifier; `num_classes`, `drop_rate` and
            `global_pool` mean nothing to it.
        out_indices: stages whose maps the pyramid returns.
        scan, fusion, layout, step: the ablation switches (`ABLATIONS`) of EfficientVMamba.
        checkpoint_path: weights, see :func:`evmamba.load_checkpoint`.

    Raises:
        UserError: unknown name, option or value; a checkpoint that cannot be read or does not fit.
    """
    base, tagged = split_name(name)
    if base not in VARIANTS and base not in PEERS:
        raise unknown_name("model", name, list_models())
    if unknown:
        raise unknown_name("model option", next(iter(unknown)), _option_names())
    switches: dict[str, Any] = {"scan": scan, "fusion": fusion, "layout": layout, "step": step}
    changed = {switch for switch, value in switches.items() if value != ABLATIONS[switch][0]}
    if twice := changed & set(tagged):
        raise UserError(f"'{name}' sets {min(twice)} already; give it once")
    switches |= tagged
    _check_switches(**switches)
    options: dict[str, Any] = {"in_chans": in_chans, "drop_path_rate": drop_path_rate}
    if features_only:
        options["out_indices"] = out_indices
    else:
        options |= {"num_classes": num_classes, "drop_rate": drop_rate, "global_pool": global_pool}
    model: Network
    if base in PEERS:
        if changed:
            raise UserError(f"{name} has no {min(changed)} to choose; the switches are EfficientVMamba's")
        if base == "vim_tiny" and options.pop("global_pool", "avg") != "avg":
            raise UserError("vim_tiny has no pool to leave out: its class token is the feature")
        classifier, pyramid = PEERS[base]
        model = pyramid(**options) if features_only else classifier(**options)
    else:
        network = FeaturePyramid if features_only else EfficientVMamba
        model = network(VARIANTS[base].dims, VARIANTS[base].depths, **options, **switches)
    model.variant = _tagged_name(base, switches) if base in VARIANTS else base
    model.pretrained_cfg = model.default_cfg = default_cfgs[base].default.to_dict()
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def _tagged_name(base: str, switches: dict[str, Any]) -> str:
    """The name that alone makes the same network, however its switches were given."""
    return "-".join([base, *(tag for tag, (switch, value) in TAGS.items() if switches[switch] == value)])


def _option_names() -> list[str]:
    return [name for name in inspect.signature(create_model).parameters if name not in ("name", "unknown")]


def _check_switches(**switches: Any) -> None:
    for switch, value in switches.items():
        if value not in ABLATIONS[switch]:
            raise unknown_name(switch, str(value), [str(valid) for valid in ABLATIONS[switch]])


EFFICIENTVMAMBA = {
    "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
    "paper_ids": "arXiv:2403.09977",
}
VMAMBA = {"paper_name": "VMamba: Visual State Space Model", "paper_ids": "arXiv:2401.10166"}
VIM = {
    "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
    "paper_ids": "arXiv:2401.09417",
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "pool_size": None,
}


def _cfg(**described: Any) -> dict[str, Any]:
    return {
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
    } | described


default_cfgs = generate_default_cfgs(
    {name: _cfg(**EFFICIENTVMAMBA) for name in VARIANTS} | {"vmamba_tiny": _cfg(**VMAMBA), "vim_tiny": _cfg(**VIM)}
)


def _timm_entry(name: str, pretrained: bool, options: dict[str, Any]) -> Network:
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
def efficientvmamba_t(pretrained: bool = False, **options: Any) -> Network:
    """EfficientVMamba-T, 6.5 M parameters, 0.81 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_t", pretrained, options)


@register_model
def efficientvmamba_s(pretrained: bool = False, **options: Any) -> Network:
    """EfficientVMamba-S, 11.3 M parameters, 1.34 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_s", pretrained, options)


@register_model
def efficientvmamba_b(pretrained: bool = False, **options: Any) -> Network:
    """EfficientVMamba-B, 33.7 M parameters, 4.00 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_b", pretrained, options)


@register_model
def vmamba_tiny(pretrained: bool = False, **options: Any) -> Network:
    """VMamba-T without MLPs, 22.9 M parameters, 5.63 G multiply-accumulates."""
    return _timm_entry("vmamba_tiny", pretrained, options)


@register_model
def vim_tiny(pretrained: bool = False, **options: Any) -> Network:
    """Vim-Ti, 7.1 M parameters, 1.82 G multiply-accumulates."""
    return _timm_entry("vim_tiny", pretrained, options)
