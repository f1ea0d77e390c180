"""Which layer of a backbone a parameter belongs to, by timm's `group_matcher`: for learning rates that fall with the
distance from the head, and for stages that are not trained at all.

Sources: layer-wise decay of BEiT (arXiv 2106.08254), as in timm's `param_groups_layer_decay`; frozen stages as in
mmdetection.
"""

from typing import Any

from timm.models import group_parameters
from torch import nn

from evmamba.errors import UserError


def layers_of(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Number of the layer of every parameter, by name: 0 is the stem, the last one what is nearest to the head.

    Args:
        backbone: of ours or timm's, classifier or pyramid.
        coarse: count stages in place of blocks (of a plain vision transformer blocks, too).

    Raises:
        UserError: the network does not say its layers.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UserError(
            f"{type(backbone).__name__} has no group_matcher, timm's way to say its layers: leave out "
            "optimizer.layer_decay and optimizer.frozen_stages"
        )
    return group_parameters(backbone, matcher(coarse=coarse), reverse=True)


def classifier_of(backbone: nn.Module) -> set[str]:
    """Names of the parameters of a backbone's own classifier, if it has one."""
    get: Any = getattr(backbone, "get_classifier", None)
    heads = get() if get is not None else ()
    mine = {id(p) for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()}
    return {name for name, parameter in backbone.named_parameters() if id(parameter) in mine}


def lr_factors(backbone: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factor of the learning rate of every parameter of a backbone: 1 for its classifier, `layer_decay` more for each
    layer below. What stands on a pyramid counts as the layer above it.

    Raises:
        UserError: see `layers_of`.
    """
    own_head = classifier_of(backbone)
    if layer_decay == 1:
        return {name: 1.0 for name, _ in backbone.named_parameters()}
    layers = layers_of(backbone)
    top = max(layers.values()) + (0 if own_head else 1)
    return {name: 1.0 if name in own_head else layer_decay ** (top - layer) for name, layer in layers.items()}


def freeze_stages(backbone: nn.Module, stages: int) -> list[nn.Module]:
    """Have the stem and the first stages not trained; a classifier is.

    Args:
        backbone: see `layers_of`.
        stages: 0 is the stem alone.

    Returns:
        The modules without a trained parameter: their BatchNorms and stochastic depth belong in evaluation mode.

    Raises:
        UserError: fewer stages than that; see `layers_of`.
    """
    layers, own_head = layers_of(backbone, coarse=True), classifier_of(backbone)
    most = max(number for name, number in layers.items() if name not in own_head)
    if not 0 <= stages <= most:
        raise UserError(
            f"optimizer.frozen_stages={stages}: the backbone's stages are numbered 1 to {most}, 0 is the stem"
        )
    for name, parameter in backbone.named_parameters():
        if layers[name] <= stages and name not in own_head:
            parameter.requires_grad = False
    return [module for module in backbone.modules() if _is_frozen(module)]


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
