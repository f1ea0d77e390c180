"""Our networks in timm's registry, for ``timm.create_model("efficientvmamba_t")``.

It imports none of our networks before one is created, as it is imported right after timm, in the midst of what imports
that (`evmamba.registration`).
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from evmamba.pretrained import fetch, hub_cfg, published_source, source_of_cfg


def _cfg(title: str, arxiv: str, **others: Any) -> dict[str, Any]:
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
        "paper_name": title,
        "paper_ids": f"arXiv:{arxiv}",
        **others,
    }


_EFFICIENTVMAMBA = _cfg("EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", "2403.09977")

_DESCRIBED = {
    "efficientvmamba_t": _EFFICIENTVMAMBA,
    "efficientvmamba_s": _EFFICIENTVMAMBA,
    "efficientvmamba_b": _EFFICIENTVMAMBA,
    "vmamba_tiny": _cfg("VMamba: Visual State Space Model", "2401.10166"),
    "vmamba_narrow": _cfg("VMamba: Visual State Space Model", "2401.10166"),
    "vim_tiny": _cfg(
        "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "2401.09417",
        pool_size=None,  # its class token is the feature
        first_conv="patch_embed.proj",
        classifier="head",
    ),
}

default_cfgs = generate_default_cfgs({name: cfg | hub_cfg(name) for name, cfg in _DESCRIBED.items()})


def _timm_entry(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Create a model for `timm.create_model`, which adds options of its own bookkeeping."""
    from evmamba.checkpoints import load_checkpoint
    from evmamba.variants import create_model

    cfg, overlay = options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None)
    cache_dir = options.pop("cache_dir", None)
    model = create_model(name, **options)
    described = resolve_pretrained_cfg(name, cfg, overlay).to_dict()
    model.pretrained_cfg = model.default_cfg = described
    if pretrained and described.get("state_dict"):
        load_checkpoint(model, described["state_dict"])
    elif pretrained:
        source = source_of_cfg(described)
        if source is None or source == source_of_cfg(hub_cfg(name)):
            source = published_source(model.variant)  # an ablated network has none, whatever fits
        load_checkpoint(model, fetch(source, cache_dir))
    return model


@register_model
def efficientvmamba_t(pretrained: bool = False, **options: Any) -> nn.Module:
    """EfficientVMamba-T, 6.5 M parameters, 0.81 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_t", pretrained, options)


@register_model
def efficientvmamba_s(pretrained: bool = False, **options: Any) -> nn.Module:
    """EfficientVMamba-S, 11.3 M parameters, 1.34 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_s", pretrained, options)


@register_model
def efficientvmamba_b(pretrained: bool = False, **options: Any) -> nn.Module:
    """EfficientVMamba-B, 33.7 M parameters, 4.00 G multiply-accumulates."""
    return _timm_entry("efficientvmamba_b", pretrained, options)


@register_model
def vmamba_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """VMamba-T without MLPs, 22.9 M parameters, 5.63 G multiply-accumulates."""
    return _timm_entry("vmamba_tiny", pretrained, options)


@register_model
def vmamba_narrow(pretrained: bool = False, **options: Any) -> nn.Module:
    """VMamba narrowed to T's cost (EfficientVMamba's table 5), 2.4 M parameters, 0.87 G multiply-accumulates."""
    return _timm_entry("vmamba_narrow", pretrained, options)


@register_model
def vim_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Vim-Ti, 7.1 M parameters, 1.82 G multiply-accumulates."""
    return _timm_entry("vim_tiny", pretrained, options)
