"""Whole detectors, as the paper counts them: at 800 x 1280 pixels, for COCO's classes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from evmamba.tasks.detection.detectors import DetectorName, Rules, build_detector
from evmamba.tasks.detection.detr import DETRS
from evmamba.tasks.whole import WholeNetwork

# Input and classes of the paper's tables 3 and 7.
SIZE, CLASSES = (800, 1280), 80
SQUARE = (640, 640)  # as RT-DETR's and D-FINE's papers count
# The field's convention for what a two-stage detector does with an image: so many regions get a box, so many a mask.
REGIONS, MASKS = 1000, 100


def whole_network(head: DetectorName, backbone: str, rules: Rules = "mmdetection") -> WholeNetwork:
    """Build a detector on a backbone; see `build_detector`."""
    if head in DETRS:
        model = build_detector(head, backbone, CLASSES, min_size=SQUARE[:1])
        return WholeNetwork(model, Dense(model), lambda image: ([image],), SQUARE, CLASSES)
    model = build_detector(head, backbone, CLASSES, rules=rules, min_size=(SIZE[0],), max_size=1333)
    return WholeNetwork(model, DenseParts(model), lambda image: ([image],), SIZE, CLASSES, {"rules": rules})


class Dense(nn.Module):
    """A detector whose work is the same for all images: all of it, on squares that are not resized."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, images: Tensor) -> None:
        with unset_fake_temporarily():  # the library looks at values, and counting gives shapes alone
            self.detector.predict(torch.zeros(images.shape))


class DenseParts(nn.Module):
    """The parts of a detector whose work can be told without looking at the image, as the field counts detectors.

    Backbone, pyramid and dense heads on images `[B, 3, H, W]` that are not resized; of a two-stage detector the box
    head on 1000 regions and the mask head on 100, whatever it would propose.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, images: Tensor) -> None:
        maps = list(self.detector.backbone(images).values())
        if not hasattr(self.detector, "rpn"):
            self.detector.head(maps)
            return
        self.detector.rpn.head(maps)
        heads, channels = self.detector.roi_heads, self.detector.backbone.out_channels
        regions = images.new_empty(REGIONS, channels, *heads.box_roi_pool.output_size)
        heads.box_predictor(heads.box_head(regions))
        if heads.has_mask():
            masks = images.new_empty(MASKS, channels, *heads.mask_roi_pool.output_size)
            heads.mask_predictor(heads.mask_head(masks))
