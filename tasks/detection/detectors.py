"""Detectors on a feature pyramid over any backbone: torchvision's modules with mmdetection's rules, or all torchvision.

RetinaNet follows PVT's recipe, which the paper's detection table follows (levels at strides 8, 16, 32, P6 and P7 from
the backbone's last map); Faster and Mask R-CNN follow Swin's (strides 4 to 32 and a subsampled fifth level). Modules
and weights are the same under either set of rules; anchors, assignment, losses, initial values, RoIAlign, suppression
and masks differ (`docs/detection.md`). 256 channels unless told otherwise.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from evmamba.errors import UserError, unknown_name
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.detection.anchors import AnchorGrid
from evmamba.tasks.detection.assign import OverlapMatcher
from evmamba.tasks.detection.detr import Detr
from evmamba.tasks.detection.metrics import MAX_DETECTIONS
from evmamba.tasks.detection.rcnn import (
    AlignedRoIAlign,
    PublishedProposals,
    PublishedRoIHeads,
    initialise_box_head,
)
from evmamba.tasks.detection.resize import PublishedResize, TorchvisionResize
from evmamba.tasks.detection.retinanet import ExtraLevels, PublishedRetinaNet

DetectorName = Literal["retinanet", "fasterrcnn", "maskrcnn", "rtdetrv2", "dfine"]
DETECTORS = get_args(DetectorName)
# Whose rules a detector follows.
Rules = Literal["mmdetection", "torchvision"]
RULES = get_args(Rules)
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
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


def build_detector(
    name: DetectorName,
    backbone: str,
    num_classes: int,
    *,
    rules: Rules = "mmdetection",
    checkpoint: str | None = None,
    drop_path_rate: float = 0.0,
    min_size: Sequence[int] = (800,),
    max_size: int = 1333,
    channels: int = 256,
    group_norm: bool = False,
    anchor_scale: float = 1.0,
    score_threshold: float = 0.05,
) -> nn.Module:
    """Build a detector that is called as torchvision's are; its labels are 1..C for R-CNNs, 0..C-1 for the others.

    Args:
        name: "retinanet", "fasterrcnn" or "maskrcnn"; "rtdetrv2" or "dfine" (see `detr.py`), for which rules, max_size,
            group_norm and anchor_scale mean nothing: they take squares of the sides min_size, rounded up to 32s.
        backbone: one of ours or any timm model.
        num_classes: C, without a background.
        rules: "mmdetection", by which the published results were made, or "torchvision".
        checkpoint: backbone weights, as of `build_backbone`.
        drop_path_rate: of the backbone.
        min_size: short side in pixels; of several, training draws one per image and evaluation takes the last.
        max_size: longest side in pixels.
        channels: of the pyramid and heads; the box head has four times as many.
        group_norm: normalise pyramid and convolutional heads (groups of 8 channels), which training from scratch needs.
        anchor_scale: factor for the anchors' sides 32..512; smaller for smaller images.
        score_threshold: detections below are dropped.

    Raises:
        UserError: unknown detector, rules or backbone, or options out of range.
    """
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS)
    if rules not in RULES:
        raise unknown_name("rules", rules, RULES)
    if channels < 8 or channels % 8:
        raise UserError(f"model.channels must be a multiple of 8, not {channels}")
    if not min_size or min(min_size) < 32 or max_size < max(min_size):
        raise UserError(f"model.min_size {list(min_size)} must hold sides from 32 up to model.max_size ({max_size})")
    body = build_backbone(
        backbone,
        features_only=True,
        out_indices=(0, 1, 2, 3) if name in ("fasterrcnn", "maskrcnn") else (1, 2, 3),
        drop_path_rate=drop_path_rate,
        checkpoint=checkpoint,
    )
    if name in ("rtdetrv2", "dfine"):
        return Detr(name, body, num_classes, sides=min_size, channels=channels, score_threshold=score_threshold)
    norm_layer = partial(nn.GroupNorm, channels // 8) if group_norm else None
    published = rules == "mmdetection"
    top: ExtraFPNBlock = LastLevelMaxPool()
    if name == "retinanet":
        top = (ExtraLevels if published else LastLevelP6P7)(_widths(body)[-1], channels)
    pyramid = Pyramid(body, channels, top, norm_layer)
    transform = (PublishedResize if published else TorchvisionResize)(tuple(min_size), max_size, MEAN, DEVIATION)
    build = _retinanet if name == "retinanet" else partial(_rcnn, masks=name == "maskrcnn")
    detector = build(pyramid, num_classes, norm_layer, anchor_scale, score_threshold, published)
    detector.transform = transform
    return detector


def _retinanet(
    pyramid: Pyramid,
    num_classes: int,
    norm_layer: Callable[..., nn.Module] | None,
    anchor_scale: float,
    score_threshold: float,
    published: bool,
) -> RetinaNet:
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    sizes = [tuple(side * anchor_scale * octave for octave in octaves) for side in ANCHOR_SIZES]
    head = RetinaNetHead(pyramid.out_channels, len(octaves) * len(ASPECT_RATIOS), num_classes, norm_layer)
    head.register_forward_hook(_in_float32)
    if published:
        _initialise_pyramid(pyramid)
    return (PublishedRetinaNet if published else RetinaNet)(
        pyramid,
        num_classes,
        anchor_generator=_anchors(sizes, finest_stride=8, published=published),
        head=head,
        score_thresh=score_threshold,
        detections_per_img=MAX_DETECTIONS,
    )


def _rcnn(
    pyramid: Pyramid,
    num_classes: int,
    norm_layer: Callable[..., nn.Module] | None,
    anchor_scale: float,
    score_threshold: float,
    published: bool,
    *,
    masks: bool,
) -> GeneralizedRCNN:
    channels, outputs = pyramid.out_channels, num_classes + 1  # label 0 is the background
    anchors = _anchors([(side * anchor_scale,) for side in ANCHOR_SIZES], finest_stride=4, published=published)
    box_head, box_predictor = TwoMLPHead(channels * 7 * 7, 4 * channels), FastRCNNPredictor(4 * channels, outputs)
    mask_parts: dict[str, Any] = {}
    if masks:
        mask_parts["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1, norm_layer)
        mask_parts["mask_predictor"] = MaskRCNNPredictor(channels, channels, outputs)
    if published:
        detector = _published_rcnn(pyramid, anchors, box_head, box_predictor, mask_parts, score_threshold)
    else:
        detector = (MaskRCNN if masks else FasterRCNN)(
            pyramid,
            rpn_anchor_generator=anchors,
            box_head=box_head,
            box_predictor=box_predictor,
            box_score_thresh=score_threshold,
            box_detections_per_img=MAX_DETECTIONS,
            **mask_parts,
        )
    detector.rpn.head.register_forward_hook(_in_float32)
    box_predictor.register_forward_hook(_in_float32)
    if masks:
        mask_parts["mask_predictor"].register_forward_hook(_in_float32)
    return detector


def _published_rcnn(
    pyramid: Pyramid,
    anchors: AnchorGrid,
    box_head: TwoMLPHead,
    box_predictor: FastRCNNPredictor,
    mask_parts: dict[str, Any],
    score_threshold: float,
) -> GeneralizedRCNN:
    """Numbers of mmdetection's `configs/_base_/models/{faster,mask}-rcnn_r50_fpn.py`."""
    _initialise_pyramid(pyramid)
    initialise_box_head(box_head, box_predictor)
    rpn = PublishedProposals(
        anchors,
        RPNHead(pyramid.out_channels, anchors.num_anchors_per_location()[0]),
        matcher=OverlapMatcher(0.7, 0.3, least=0.3),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )
    if mask_parts:
        nn.init.zeros_(mask_parts["mask_predictor"].conv5_mask.bias)
        nn.init.zeros_(mask_parts["mask_predictor"].mask_fcn_logits.bias)
        mask_parts |= {"mask_roi_pool": AlignedRoIAlign("0123", 14, (4, 8, 16, 32))}
    roi_heads = PublishedRoIHeads(
        AlignedRoIAlign("0123", 7, (4, 8, 16, 32)),
        box_head,
        box_predictor,
        # Mask R-CNN's configuration has the low-quality step, Faster R-CNN's has not.
        matcher=OverlapMatcher(0.5, 0.5, least=0.5 if mask_parts else None),
        batch_size_per_image=512,
        positive_fraction=0.25,
        score_thresh=score_threshold,
        nms_thresh=0.5,
        detections_per_img=MAX_DETECTIONS,
        **mask_parts,
    )
    return GeneralizedRCNN(pyramid, rpn, roi_heads, transform=None)


def _initialise_pyramid(pyramid: Pyramid) -> None:
    """mmdetection's start: Xavier uniform."""
    for layer in pyramid.fpn.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)


def _widths(body: nn.Module) -> list[int]:
    """Channels of a backbone's maps, finest first."""
    info: Any = body.feature_info
    return info.channels()


def _anchors(sizes: list[tuple[float, ...]], finest_stride: int, published: bool) -> AnchorGenerator:
    if published:
        return AnchorGrid(sizes, ASPECT_RATIOS, [finest_stride * 2**level for level in range(len(sizes))])
    return AnchorGenerator(tuple(sizes), (ASPECT_RATIOS,) * len(sizes))


def _in_float32(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook: under autocast torchvision would decode boxes in bfloat16, whose step at pixel 1000 is 4 pixels."""
    return tree_map(torch.Tensor.float, output)
