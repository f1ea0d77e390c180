"""torchvision's detectors on a feature pyramid over any backbone.

RetinaNet follows PVT's recipe, which the paper's detection table follows (levels at strides 8, 16, 32, P6 and P7 from
the backbone's last map); Faster and Mask R-CNN follow Swin's (strides 4 to 32 and a subsampled fifth level). Heads are
torchvision's with 256 channels unless told otherwise.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from evmamba.errors import UserError, unknown_name
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.detection.metrics import MAX_DETECTIONS

DetectorName = Literal["retinanet", "fasterrcnn", "maskrcnn"]
DETECTORS = ("retinanet", "fasterrcnn", "maskrcnn")
# Pixels of the resized image; one per pyramid level.
ANCHOR_SIZES = (32, 64, 128, 256, 512)
ASPECT_RATIOS = (0.5, 1.0, 2.0)


class Pyramid(nn.Module):
    """Backbone and feature pyramid network.

    ``forward``: images [B, 3, H, W] -> ordered dict of float32 maps [B, channels, h, w], finest first.
    """

    def __init__(
        self, body: nn.Module, channels: int, top: ExtraFPNBlock, norm_layer: Callable[..., nn.Module] | None
    ) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(_widths(body), channels, top, norm_layer)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.fpn(OrderedDict((str(level), m) for level, m in enumerate(self.body(x))))
        return OrderedDict((name, m.float()) for name, m in maps.items())


class Resize(GeneralizedRCNNTransform):
    """torchvision's normalising, resizing and padding, also for strips whose short side would shrink to no pixel.

    They are stretched to that one pixel, boxes and masks with them; torchvision brings predictions back.
    """

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image [3, H, W] and its target (boxes in its pixels, masks [n, H, W])."""
        size = [int(side) for side in image.shape[-2:]]
        least = max(size) // self.max_size + 1  # more than max(size) / max_size: rounding must not end below a pixel
        if min(size) < least:
            stretched = [max(side, least) for side in size]
            image = interpolate(image[None], size=stretched, mode="bilinear", align_corners=False)[0]
            if target is not None:
                target = target | {"boxes": resize_boxes(target["boxes"], size, stretched)}
                if "masks" in target:
                    target["masks"] = interpolate(target["masks"][:, None], size=stretched)[:, 0]
        return super().resize(image, target)


def build_detector(
    name: DetectorName,
    backbone: str,
    num_classes: int,
    *,
    checkpoint: str | None = None,
    drop_path_rate: float = 0.0,
    min_size: Sequence[int] = (800,),
    max_size: int = 1333,
    channels: int = 256,
    group_norm: bool = False,
    anchor_scale: float = 1.0,
    score_threshold: float = 0.05,
) -> nn.Module:
    """Build a detector that is called as torchvision's are; its labels are 0..C-1 for RetinaNet, 1..C for the others.

    Args:
        name: "retinanet", "fasterrcnn" or "maskrcnn".
        backbone: one of ours or any timm model.
        num_classes: C, without a background.
        checkpoint: backbone weights.
        drop_path_rate: of the backbone.
        min_size: short side in pixels; of several, training draws one per image and evaluation takes the last.
        max_size: longest side in pixels.
        channels: of the pyramid and heads; the box head has four times as many.
        group_norm: normalise pyramid and convolutional heads (groups of 8 channels), which training from scratch needs.
        anchor_scale: factor for the anchors' sides 32..512; smaller for smaller images.
        score_threshold: detections below are dropped.

    Raises:
        UserError: unknown detector or backbone, or options out of range.
    """
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS)
    if channels < 8 or channels % 8:
        raise UserError(f"model.channels must be a multiple of 8, not {channels}")
    if not min_size or min(min_size) < 32 or max_size < max(min_size):
        raise UserError(f"model.min_size {list(min_size)} must hold sides from 32 up to model.max_size ({max_size})")
    levels = (1, 2, 3) if name == "retinanet" else (0, 1, 2, 3)
    body = build_backbone(
        backbone, features_only=True, out_indices=levels, drop_path_rate=drop_path_rate, checkpoint=checkpoint
    )
    norm_layer = partial(nn.GroupNorm, channels // 8) if group_norm else None
    top = LastLevelP6P7(_widths(body)[-1], channels) if name == "retinanet" else LastLevelMaxPool()
    pyramid = Pyramid(body, channels, top, norm_layer)
    sizes = {"min_size": tuple(min_size), "max_size": max_size}
    detector: RetinaNet | FasterRCNN
    if name == "retinanet":
        detector = _retinanet(pyramid, num_classes, norm_layer, anchor_scale, score_threshold, sizes)
    else:
        masks = name == "maskrcnn"
        detector = _rcnn(pyramid, num_classes, norm_layer, anchor_scale, score_threshold, sizes, masks=masks)
    plain = detector.transform
    detector.transform = Resize(plain.min_size, plain.max_size, plain.image_mean, plain.image_std)
    return detector


def _retinanet(
    pyramid: Pyramid,
    num_classes: int,
    norm_layer: Callable[..., nn.Module] | None,
    anchor_scale: float,
    score_threshold: float,
    sizes: dict[str, Any],
) -> RetinaNet:
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    anchors = _anchors([tuple(side * anchor_scale * octave for octave in octaves) for side in ANCHOR_SIZES])
    head = RetinaNetHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes, norm_layer)
    head.register_forward_hook(_in_float32)
    return RetinaNet(
        pyramid,
        num_classes,
        anchor_generator=anchors,
        head=head,
        score_thresh=score_threshold,
        detections_per_img=MAX_DETECTIONS,
        **sizes,
    )


def _rcnn(
    pyramid: Pyramid,
    num_classes: int,
    norm_layer: Callable[..., nn.Module] | None,
    anchor_scale: float,
    score_threshold: float,
    sizes: dict[str, Any],
    *,
    masks: bool,
) -> FasterRCNN:
    channels, outputs = pyramid.out_channels, num_classes + 1  # torchvision's label 0 is the background
    options = sizes | {
        "rpn_anchor_generator": _anchors([(side * anchor_scale,) for side in ANCHOR_SIZES]),
        "box_head": TwoMLPHead(channels * 7 * 7, 4 * channels),
        "box_predictor": FastRCNNPredictor(4 * channels, outputs),
        "box_score_thresh": score_threshold,
        "box_detections_per_img": MAX_DETECTIONS,
    }
    if masks:
        options["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1, norm_layer)
        options["mask_predictor"] = MaskRCNNPredictor(channels, channels, outputs)
    detector = (MaskRCNN if masks else FasterRCNN)(pyramid, **options)
    detector.rpn.head.register_forward_hook(_in_float32)
    detector.roi_heads.box_predictor.register_forward_hook(_in_float32)
    if masks:
        detector.roi_heads.mask_predictor.register_forward_hook(_in_float32)
    return detector


def _widths(body: nn.Module) -> list[int]:
    """Channels of a backbone's maps, finest first."""
    info: Any = body.feature_info
    return info.channels()


def _anchors(sizes: list[tuple[float, ...]]) -> AnchorGenerator:
    return AnchorGenerator(tuple(sizes), (ASPECT_RATIOS,) * len(sizes))


def _in_float32(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook: under autocast torchvision would decode boxes in bfloat16, whose step at pixel 1000 is 4 pixels."""
    return tree_map(torch.Tensor.float, output)
