"""BatchNorm in evaluation: one multiplication and one addition a channel, folded into a convolution or by a kernel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import cpu_kernels


class Norm(NamedTuple):
    """A BatchNorm in evaluation: its tensors, each `[C]`, and its epsilon."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def check(self, x: Tensor) -> None:
        """Raises ValueError where it is not for tokens x `[..., C]`."""
        if not x.shape[-1:] == self.mean.shape == self.var.shape == self.weight.shape == self.bias.shape:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self[:4])
            raise ValueError(f"norm's tensors must be {list(x.shape[-1:])}, got {shapes}")


def folded(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight `[C, ..., kh, kw]` and bias `[C]` of a convolution with the norm after it in them."""
    scale = norm.weight * torch.rsqrt(norm.var + norm.eps)
    shift = torch.addcmul(norm.bias, norm.mean if bias is None else norm.mean - bias, scale, value=-1)
    return weight * scale.view(-1, 1, 1, 1), shift


def normalise(x: Tensor, norm: Norm, relu: bool = False) -> Tensor:
    """BatchNorm of tokens x `[B, H, W, C]` by what it has learnt, then a ReLU if asked for; in x's type.

    Raises ValueError for a norm of other channels.
    """
    norm.check(x)
    if kernels := cpu_kernels(x, x.shape[-1], *norm[:4]):
        return kernels.batch_norm(x, norm, relu)
    y = F.batch_norm(x.permute(0, 3, 1, 2), *norm[:4], eps=norm.eps).permute(0, 2, 3, 1)
    return F.relu(y) if relu else y
