"""Networks for inference: BatchNorms folded into the convolutions before them, weights cast once."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evmamba.blocks import ConvBranch, InvertedResidual
from evmamba.errors import UserError

Network = TypeVar("Network", bound=nn.Module)


def fuse(model: Network, dtype: torch.dtype | None = None) -> Network:
    """A copy of a network for inference, with every BatchNorm of its EfficientVMamba blocks folded into a convolution.

    Any module that contains such blocks: classifier, feature pyramid, or a detector around one. Outputs differ by
    rounding only. The copy has other parameter names (no checkpoint fits it) and cannot be trained as the network was.

    Args:
        model: in evaluation mode.
        dtype: cast the weights of linear layers and convolutions to this type, once, where autocast would do it in
            every pass; images have to come in it. Norms and the scan's parameters stay as they are.

    Raises:
        UserError: a network in training mode, whose BatchNorms depend on the batch.
    """
    if model.training:
        raise UserError("fuse folds the statistics that BatchNorm has learnt: call model.eval() before it")
    fused = copy.deepcopy(model)
    for block in fused.modules():
        if isinstance(block, InvertedResidual):
            for convolution in ("expand", "depthwise", "project"):
                _fold(block, convolution, f"{convolution}_norm")
        elif isinstance(block, ConvBranch):
            _fold(block, "depthwise", "norm")
    for module in fused.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return fused


def _fold(block: nn.Module, convolution: str, norm: str) -> None:
    before, folded = block.get_submodule(convolution), block.get_submodule(norm)
    if isinstance(before, nn.Conv2d) and isinstance(folded, nn.BatchNorm2d):
        setattr(block, convolution, fuse_conv_bn_eval(before, folded))
        setattr(block, norm, nn.Identity())
