"""UPerNet: a segmentation decoder on a feature pyramid, with the auxiliary head that training uses.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221. EfficientVMamba (arXiv
2403.09977) uses it in table 4; decoder widths 256 / 384 / 512 give the parameters and multiply-accumulates of that
table for T / S / B.

Shape letters: B batch, H and W rows and columns of the image, C classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_SIZES = (1, 2, 3, 6)


class UPerNet(nn.Module):
    """Backbone, UPerNet decoder and auxiliary FCN head.

    Args:
        backbone: module whose forward gives four NCHW maps at strides 4, 8, 16, 32 and that has
            ``feature_info.channels()``.
        num_classes: C.
        channels: width of the decoder.
        aux_channels: width of the auxiliary head, which reads the third map; 0 leaves the head out.
        dropout: share of decoder channels dropped ahead of each classifier, in training.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, channels: int = 256, aux_channels: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        in_channels: list[int] = backbone.feature_info.channels()  # type: ignore[operator, union-attr]
        if len(in_channels) != 4:
            raise ValueError(f"UPerNet needs four feature maps, the backbone gives {len(in_channels)}")
        self.backbone = backbone
        self.decoder = UPerHead(in_channels, num_classes, channels, dropout)
        self.auxiliary = FCNHead(in_channels[2], num_classes, aux_channels, dropout) if aux_channels else None

    def forward(self, image: Tensor) -> Tensor:
        """Class scores at stride 4: ``[B, 3, H, W] -> [B, C, ~H/4, ~W/4]``."""
        return self.decoder(self.backbone(image))

    def forward_with_auxiliary(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class scores of the decoder (stride 4) and of the auxiliary head (stride 16), for training."""
        maps = self.backbone(image)
        return self.decoder(maps), self.auxiliary(maps[2]) if self.auxiliary is not None else None


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down feature pyramid, and one fusion of all levels at stride 4."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        *finer, coarsest = in_channels
        self.pyramid_pooling = PyramidPooling(coarsest, channels)
        self.lateral = nn.ModuleList(conv_bn_relu(c, channels, 1) for c in finer)
        self.smooth = nn.ModuleList(conv_bn_relu(channels, channels, 3) for _ in finer)
        self.fuse = conv_bn_relu(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        top_down = self.pyramid_pooling(maps[-1])
        levels = [top_down]
        for x, lateral, smooth in zip(maps[-2::-1], reversed(self.lateral), reversed(self.smooth), strict=True):
            top_down = lateral(x) + resize(top_down, x.shape[-2:])
            levels.insert(0, smooth(top_down))
        size = levels[0].shape[-2:]
        fused = self.fuse(torch.cat([resize(level, size) for level in levels], dim=1))
        return self.classifier(self.dropout(fused))


class RegionPool(nn.AdaptiveAvgPool2d):
    """Averages over size x size regions, which overlap where the map's height or width is no multiple of size.

    An exported graph with dynamic sizes cannot hold the regions as indices; it has the same averages as two products
    with matrices that follow from the map's size.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return super().forward(x)
        rows, columns = (_region_weights(self.size, length, x) for length in x.shape[-2:])
        return rows @ x @ columns.mT


def _region_weights(regions: int, length: int, like: Tensor) -> Tensor:
    """``[regions, length]``: row k averages over floor(k length / regions) to ceil((k + 1) length / regions)."""
    k = torch.arange(regions, device=like.device)[:, None]
    first = k * length // regions
    end = ((k + 1) * length + regions - 1) // regions
    place = torch.arange(length, device=like.device)
    inside = (place >= first) & (place < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


class PyramidPooling(nn.Module):
    """The map beside its averages over 1, 4, 9 and 36 regions, fused to one map (Zhao et al., arXiv 1612.01105)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(RegionPool(size), conv_bn_relu(in_channels, channels, 1)) for size in POOL_SIZES
        )
        self.fuse = conv_bn_relu(in_channels + len(POOL_SIZES) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [resize(branch(x), x.shape[-2:]) for branch in self.branches]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier (Long et al., arXiv 1411.4038)."""

    def __init__(self, in_channels: int, num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = conv_bn_relu(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.conv(x)))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, pixel centres aligned; the map itself when it already has the size."""
    if x.shape[-2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that begins, as in mmsegmentation, with Kaiming's normal values for ReLU (fan out)."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    """1x1, beginning as in mmsegmentation with a normal of deviation 0.01."""
    convolution = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution
