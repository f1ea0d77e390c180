"""RetinaNet on torchvision's modules with mmdetection's rules: the weights are interchangeable, what is done is not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from evmamba.tasks.detection.anchors import AnchorGrid
from evmamba.tasks.detection.assign import OverlapMatcher, TwoSidedBoxCoder, assign
from evmamba.tasks.detection.losses import retinanet_losses


class ExtraLevels(LastLevelP6P7):
    """Two more levels: a convolution of stride 2 on the last input map, and another on its result without ReLU between
    (torchvision has one there)."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        first = self.p6(c[-1])
        return [*p, first, self.p7(first)], [*names, "p6", "p7"]


class PublishedRetinaNet(RetinaNet):
    """RetinaNet as `configs/pvt/retinanet_pvt-t_fpn_1x_coco.py` of mmdetection builds it.

    Called as torchvision's: images [3, h, w] in 0..1 and, in training, targets -> losses by name, or per image boxes
    [n, 4], labels [n] (0..C-1) and scores [n], descending.

    Args:
        See torchvision's RetinaNet; `anchor_generator` is an `AnchorGrid`.
    """

    anchor_generator: AnchorGrid

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, proposal_matcher=OverlapMatcher(0.5, 0.4, least=0.0), **options)
        self.box_coder = TwoSidedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        batch, targets = self.transform(images, targets)
        maps = list(self.backbone(batch.tensors).values())
        outputs = self.head(maps)
        anchors = self.anchor_generator(batch, maps)
        if self.training:
            assert targets is not None
            counting = self.anchor_generator.counting(batch.image_sizes, maps)
            return self.losses(outputs["cls_logits"], outputs["bbox_regression"], anchors, counting, targets)
        per_level = [
            level.shape[-2] * level.shape[-1] * n
            for level, n in zip(maps, self.anchor_generator.num_anchors_per_location(), strict=True)
        ]
        found = [
            self.detections(logits.split(per_level), codes.split(per_level), own.split(per_level), size)
            for logits, codes, own, size in zip(
                outputs["cls_logits"], outputs["bbox_regression"], anchors, batch.image_sizes, strict=True
            )
        ]
        return self.transform.postprocess(found, batch.image_sizes, sizes)

    def losses(
        self,
        logits: Tensor,
        codes: Tensor,
        anchors: Sequence[Tensor],
        counting: Sequence[Tensor | None],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Assign and compare; see `retinanet_losses`, and `AnchorGrid.counting` for `counting`."""
        matches = [
            assign(target["boxes"], own, self.proposal_matcher, inside)
            for target, own, inside in zip(targets, anchors, counting, strict=True)
        ]
        return retinanet_losses(logits, codes, anchors, targets, matches, self.box_coder)

    def detections(
        self,
        logits: Sequence[Tensor],
        codes: Sequence[Tensor],
        anchors: Sequence[Tensor],
        size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """One image's boxes [n, 4] in its resized pixels, scores and labels, best first.

        Args:
            logits, codes, anchors: per level [n, C], [n, 4], [n, 4].
            size: height and width, resized, without padding.
        """
        boxes, scores, labels = [], [], []
        for level_logits, level_codes, level_anchors in zip(logits, codes, anchors, strict=True):
            flat = level_logits.sigmoid().flatten()
            places = torch.where(flat > self.score_thresh)[0]
            best, order = flat[places].topk(min(self.topk_candidates, len(places)))
            anchor, label = places[order] // level_logits.shape[-1], places[order] % level_logits.shape[-1]
            boxes.append(self.box_coder.decode_single(level_codes[anchor], level_anchors[anchor]))
            scores.append(best)
            labels.append(label)
        clipped = clip_boxes_to_image(torch.cat(boxes), size)
        found = {"boxes": clipped, "scores": torch.cat(scores), "labels": torch.cat(labels)}
        keep = (clipped[:, 2:] > clipped[:, :2]).all(1)
        found = {key: value[keep] for key, value in found.items()}
        keep = batched_nms(found["boxes"], found["scores"], found["labels"], self.nms_thresh)[: self.detections_per_img]
        return {key: value[keep] for key, value in found.items()}
