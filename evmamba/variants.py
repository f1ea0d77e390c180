"""The named networks: one table of variants and peers, and `create_model`; timm has them from `timm_models.py`.

Source: EfficientVMamba, arXiv 2403.09977, table 1, with the widths of the published weights (S is 64, 128, 256, 512;
the paper's table prints those of B) and the ablations of tables 5 (scan, fusion), 6 and 8 (layout); the atrous step is
its section 4.1's parameter p.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from timm.models import get_pretrained_cfg

from evmamba.backbone import Backbone
from evmamba.checkpoints import load_checkpoint
from evmamba.errors import UserError, unknown_name
from evmamba.model import EfficientVMamba, FeaturePyramid
from evmamba.peers.vim import Vim, VimPyramid
from evmamba.pretrained import fetch, parse_source, published_source


@dataclass(frozen=True)
class Variant:
    """A published network.

    Attributes:
        options: of its constructors; the others are the caller's.
        classifier, pyramid: its classes.
    """

    options: Mapping[str, Any]
    classifier: type[Backbone] = EfficientVMamba
    pyramid: type[Backbone] = FeaturePyramid


VARIANTS = {
    "efficientvmamba_t": Variant({"dims": (48, 96, 192, 384), "depths": (2, 2, 4, 2), "state_dim": 16}),
    "efficientvmamba_s": Variant({"dims": (64, 128, 256, 512), "depths": (2, 2, 4, 2), "state_dim": 16}),
    "efficientvmamba_b": Variant({"dims": (96, 192, 384, 768), "depths": (2, 2, 9, 2), "state_dim": 16}),
    # Its first version (January 2024): every block is `x + DropPath(SS2D(LayerNorm(x)))`, without an MLP. That is our
    # trunk with other switches, under the same names in the original's checkpoints.
    "vmamba_tiny": Variant(
        {
            "dims": (96, 192, 384, 768),
            "depths": (2, 2, 9, 2),
            "state_dim": 16,
            "scan": "ss2d",
            "fusion": False,
            "layout": "EEEE",
            "step": 2,
        }
    ),
    # VMamba as narrow as T, of table 5's first row: the paper prints neither widths nor depths, its author told them.
    "vmamba_narrow": Variant(
        {
            "dims": (32, 64, 128, 256),
            "depths": (2, 2, 4, 2),
            "state_dim": 16,
            "scan": "ss2d",
            "fusion": False,
            "layout": "EEEE",
            "step": 2,
        }
    ),
    "vim_tiny": Variant({"dim": 192, "depth": 24, "state_dim": 16}, Vim, VimPyramid),
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
    """Names that `create_model` knows, without those of ablated networks (`TAGS`)."""
    return sorted(VARIANTS)


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
    _check_options(base, switches)
    return base, switches


def create_model(
    name: str,
    *,
    features_only: bool = False,
    pretrained: bool | str | PathLike[str] = False,
    checkpoint_path: str | PathLike[str] | None = None,
    cache_dir: str | PathLike[str] | None = None,
    **options: Any,
) -> Backbone:
    """Create a named network with fresh or loaded parameters.

    Args:
        name: one of `list_models`; EfficientVMamba's may end with tags that set ablation switches (`TAGS`).
        features_only: the feature pyramid in place of the classifier.
        pretrained: True loads the published weights (`evmamba/weights.yaml`); a source those of a file, a URL or a
            repository, see `evmamba.pretrained`. What is loaded must fit as for `evmamba.load_checkpoint`.
        checkpoint_path: the same for a file.
        cache_dir: where downloads are kept, in place of the hub's cache.
        options: of the network's classes, but for what makes the published network. Those of the classifier alone
            (`num_classes`, `drop_rate`, `global_pool`) mean nothing to the pyramid, and the other way round
            (`out_indices`); `in_chans` and `drop_path_rate` belong to both, and so do EfficientVMamba's ablation
            switches `scan`, `fusion`, `layout` and `step`, with the values of `ABLATIONS`.

    Raises:
        UserError: unknown name, option or value; no published weights; weights that cannot be fetched or read, or do
            not fit.
    """
    base, switches = split_name(name)
    if base not in VARIANTS:
        raise unknown_name("model", name, list_models())
    if twice := options.keys() & switches.keys():
        raise UserError(f"'{name}' sets {min(twice)} already; give it once")
    _check_options(base, options)
    variant = VARIANTS[base]
    kind = variant.pyramid if features_only else variant.classifier
    taken = {option: value for option, value in options.items() if option in _parameters(kind)}
    model = kind(**variant.options, **switches, **taken)
    model.variant = _tagged_name(base, options | switches)
    cfg = get_pretrained_cfg(base)  # `evmamba.timm_models` has put it into timm's registry
    assert cfg is not None
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    if checkpoint_path is not None:
        if pretrained:
            raise UserError("give pretrained or checkpoint_path, not both")
        pretrained = checkpoint_path
    if pretrained:
        source = published_source(model.variant) if pretrained is True else parse_source(pretrained)
        load_checkpoint(model, fetch(source, cache_dir))
    return model


def _check_options(base: str, options: Mapping[str, Any]) -> None:
    variant = VARIANTS[base]
    known = _parameters(variant.classifier) | _parameters(variant.pyramid)
    for option, value in options.items():
        if option in variant.options:
            raise UserError(f"{base} has no {option} to choose, it is {variant.options[option]}")
        if option not in known:
            raise unknown_name(f"option of {base}", option, known - variant.options.keys())
        if option in ABLATIONS and value not in ABLATIONS[option]:
            raise unknown_name(option, str(value), [str(valid) for valid in ABLATIONS[option]])


def _parameters(kind: type[Backbone]) -> set[str]:
    return set(inspect.signature(kind).parameters)


def _tagged_name(base: str, options: Mapping[str, Any]) -> str:
    """The name that alone makes the same network, however its switches were given."""
    return "-".join([base, *(tag for tag, (switch, value) in TAGS.items() if options.get(switch) == value)])
