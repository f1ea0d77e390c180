"""Region proposals and RoI heads on torchvision's modules with mmdetection's rules; the weights are interchangeable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, roi_align

from evmamba.tasks.detection.anchors import AnchorGrid
from evmamba.tasks.detection.assign import OverlapMatcher, TwoSidedBoxCoder, assign
from evmamba.tasks.detection.losses import box_head_losses, mask_loss, proposal_losses
from evmamba.tasks.detection.masks import mask_targets

# Side in pixels of a region that is read from the finest map up to twice that; the next map takes twice as large ones.
FINEST_SIDE = 56
# Of the box head's code: 1 / 0.1 and 1 / 0.2.
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class PublishedProposals(RegionProposalNetwork):
    """Region proposals; called as torchvision's.

    Args:
        args, options: torchvision's; the anchor generator is an `AnchorGrid`.
        matcher: which anchors have an object.
    """

    anchor_generator: AnchorGrid

    def __init__(self, *args: Any, matcher: OverlapMatcher, **options: Any) -> None:
        thresholds = {"fg_iou_thresh": matcher.high_threshold, "bg_iou_thresh": matcher.low_threshold}
        super().__init__(*args, **thresholds, **options)
        self.proposal_matcher = matcher
        self.box_coder = TwoSidedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals [n, 4] of every image, and in training the losses."""
        maps = list(features.values())
        logit_maps, code_maps = self.head(maps)
        anchors = self.anchor_generator(images, maps)
        per_level = [logits[0].numel() for logits in logit_maps]
        batch = len(images.image_sizes)
        flat_logits, flat_codes = concat_box_prediction_layers(logit_maps, code_maps)
        logits, codes = flat_logits.reshape(batch, -1), flat_codes.reshape(batch, -1, 4)
        proposals = [
            self.propose(own.split(per_level), own_codes.split(per_level), own_anchors.split(per_level), size)[0]
            for own, own_codes, own_anchors, size in zip(
                logits.detach(), codes.detach(), anchors, images.image_sizes, strict=True
            )
        ]
        if not self.training:
            return proposals, {}
        assert targets is not None
        counting = self.anchor_generator.counting(images.image_sizes, maps)
        matches = self.matches(anchors, counting, targets)
        positive, negative = self.sample(matches)
        return proposals, self.losses(logits, codes, anchors, targets, matches, positive, negative)

    def propose(
        self, logits: Sequence[Tensor], codes: Sequence[Tensor], anchors: Sequence[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """One image's proposals [n, 4] and their scores, best first.

        Args:
            logits, codes, anchors: per level [n], [n, 4], [n, 4].
            size: height and width of the image, without padding.
        """
        boxes, scores, levels = [], [], []
        for k, (level_logits, level_codes, level_anchors) in enumerate(zip(logits, codes, anchors, strict=True)):
            best, order = level_logits.topk(min(self.pre_nms_top_n(), len(level_logits)))
            boxes.append(self.box_coder.decode_single(level_codes[order], level_anchors[order]))
            scores.append(best.sigmoid())
            levels.append(torch.full_like(order, k))
        clipped, score, level = clip_boxes_to_image(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
        keep = (clipped[:, 2:] > clipped[:, :2]).all(1)
        clipped, score, level = clipped[keep], score[keep], level[keep]
        keep = batched_nms(clipped, score, level, self.nms_thresh)[: self.post_nms_top_n()]
        return clipped[keep], score[keep]

    def matches(
        self, anchors: Sequence[Tensor], counting: Sequence[Tensor | None], targets: Sequence[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Per image what `assign` says of every anchor."""
        return [
            assign(target["boxes"], own, self.proposal_matcher, inside)
            for target, own, inside in zip(targets, anchors, counting, strict=True)
        ]

    def sample(self, matches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Which anchors teach, drawn at random: bool [B, N], positive and negative ones."""
        kinds = [(match >= 0).long() - (match < -1).long() for match in matches]  # 1 object, 0 background, -1 neither
        positive, negative = self.fg_bg_sampler(kinds)
        return torch.stack(positive).bool(), torch.stack(negative).bool()

    def losses(
        self,
        logits: Tensor,
        codes: Tensor,
        anchors: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        matches: Sequence[Tensor],
        positive: Tensor,
        negative: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of sampled anchors; [B, N], [B, N, 4], and per image [N, 4], boxes, [N]; see `proposal_losses`."""
        wanted = torch.zeros_like(codes)
        for k, target in enumerate(targets):
            own = positive[k]
            objects = target["boxes"].to(codes)[matches[k][own]]
            wanted[k, own] = self.box_coder.encode_single(objects, anchors[k][own])
        objectness, boxes = proposal_losses(logits, codes, positive, negative, wanted)
        return {"loss_objectness": objectness, "loss_rpn_box_reg": boxes}


class AlignedRoIAlign(MultiScaleRoIAlign):
    """RoIAlign without the half-pixel shift and with as many samples in a bin as the region has pixels of the map.

    Args:
        names: of the maps to read from, finest first.
        output_size: bins along a side.
        strides: of these maps.
    """

    def __init__(self, names: Sequence[str], output_size: int, strides: Sequence[int]) -> None:
        super().__init__(list(names), output_size, sampling_ratio=-1)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps [B, C, h, w] by name and per image boxes [n, 4] -> [all n, C, bins, bins]."""
        corners = torch.cat(boxes)
        image = torch.repeat_interleave(
            torch.arange(len(boxes), device=corners.device),
            torch.tensor([len(own) for own in boxes], device=corners.device),
        )
        rois = torch.cat([image[:, None].to(corners), corners], dim=1)
        levels = self.levels(corners)
        first = x[self.featmap_names[0]]
        pooled = first.new_zeros(len(rois), first.shape[1], *self.output_size)
        for k, (name, stride) in enumerate(zip(self.featmap_names, self.strides, strict=True)):
            own = torch.where(levels == k)[0]
            pooled[own] = roi_align(
                x[name], rois[own], self.output_size, 1 / stride, self.sampling_ratio, aligned=True
            ).to(pooled.dtype)
        return pooled

    def levels(self, boxes: Tensor) -> Tensor:
        """Which map every box [n, 4] is read from, [n]."""
        side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        return (side / FINEST_SIDE + 1e-6).log2().floor().clamp(0, len(self.strides) - 1).long()


class PublishedRoIHeads(RoIHeads):
    """Box and mask heads; called as torchvision's, labels 1..C and 0 for the background.

    Args:
        args, options: torchvision's.
        matcher: which proposals have an object.
    """

    def __init__(self, *args: Any, matcher: OverlapMatcher, **options: Any) -> None:
        thresholds = {"fg_iou_thresh": matcher.high_threshold, "bg_iou_thresh": matcher.low_threshold}
        super().__init__(*args, **thresholds, bbox_reg_weights=BOX_WEIGHTS, **options)
        self.proposal_matcher = matcher
        self.box_coder = TwoSidedBoxCoder(BOX_WEIGHTS)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Per image boxes, labels, scores and masks [n, 1, S, S]; in training the losses."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None
        candidates, objects, labels = self.candidates(proposals, targets)
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, candidates, image_shapes)))
        wanted = self.wanted_codes(candidates, objects, targets)
        classifier, box_reg = box_head_losses(logits, codes, labels, wanted)
        losses = {"loss_classifier": classifier, "loss_box_reg": box_reg}
        if self.has_mask():
            positive = [own > 0 for own in labels]
            boxes = [own[kept] for own, kept in zip(candidates, positive, strict=True)]
            pooled = self.mask_roi_pool(features, boxes, image_shapes)
            mask_logits = self.mask_predictor(self.mask_head(pooled))
            side = mask_logits.shape[-1]
            masks = [
                mask_targets(target["masks"], own, index[kept], side)
                for target, own, index, kept in zip(targets, boxes, objects, positive, strict=True)
            ]
            classes = torch.cat([own[kept] for own, kept in zip(labels, positive, strict=True)])
            losses["loss_mask"] = mask_loss(mask_logits, classes, torch.cat(masks))
        return [], losses

    def candidates(
        self, proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per image the sampled candidates [n, 4], the object of each (0 where it has none) and its label.

        The objects' own boxes come first; they are added after the assignment, each with its own object.
        """
        everything = [self.assigned(own, target) for own, target in zip(proposals, targets, strict=True)]
        sampled = self.subsample([labels for _, _, labels in everything])
        kept = [tuple(column[index] for column in columns) for columns, index in zip(everything, sampled, strict=True)]
        boxes, objects, labels = (list(column) for column in zip(*kept, strict=True))
        return boxes, objects, labels

    def assigned(self, proposals: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """All candidates of one image, before sampling; see `candidates`."""
        boxes = target["boxes"].to(proposals)
        matches = assign(boxes, proposals, self.proposal_matcher)
        matches = torch.cat([torch.arange(len(boxes), device=matches.device), matches])
        labels = torch.zeros_like(matches)
        labels[matches >= 0] = target["labels"][matches[matches >= 0]]
        return torch.cat([boxes, proposals]), matches.clamp(min=0), labels

    def wanted_codes(
        self, candidates: Sequence[Tensor], objects: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Per image the encoded boxes [n, 4] of the candidates' objects; only those of positive ones mean anything."""
        return [
            self.box_coder.encode_single(target["boxes"].to(own)[index], own) if len(target["boxes"]) else own * 0
            for own, index, target in zip(candidates, objects, targets, strict=True)
        ]

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per image boxes [n, 4] in resized pixels, scores, labels, best first; boxes without area stay."""
        counts = [len(own) for own in proposals]
        boxes, scores, labels = [], [], []
        for own_scores, own_codes, own, size in zip(
            class_logits.softmax(-1).split(counts), box_regression.split(counts), proposals, image_shapes, strict=True
        ):
            region, label = torch.where(own_scores[:, 1:] > self.score_thresh)
            label = label + 1
            codes = own_codes.unflatten(1, (-1, 4))[region, label]
            found = clip_boxes_to_image(self.box_coder.decode_single(codes, own[region]), size)
            score = own_scores[region, label]
            keep = batched_nms(found, score, label, self.nms_thresh)[: self.detections_per_img]
            boxes.append(found[keep])
            scores.append(score[keep])
            labels.append(label[keep])
        return boxes, scores, labels

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits, codes = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        boxes, scores, labels = self.postprocess_detections(logits, codes, proposals, image_shapes)
        found = [
            dict(zip(("boxes", "scores", "labels"), own, strict=True))
            for own in zip(boxes, scores, labels, strict=True)
        ]
        if self.has_mask():
            mask_logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            for own, masks in zip(found, maskrcnn_inference(mask_logits, labels), strict=True):
                own["masks"] = masks
        return found


def initialise_box_head(layers: TwoMLPHead, predictor: FastRCNNPredictor) -> None:
    """mmdetection's start of the box head: Xavier for its layers, small normals for scores and boxes."""
    for layer in (layers.fc6, layers.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
