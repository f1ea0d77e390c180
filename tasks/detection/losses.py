"""The losses of RetinaNet, of the region proposals and of the box and mask heads, as in mmdetection.

Box losses are L1. Every sum runs over the whole batch of the process and is divided once, by one number for the batch;
torchvision divides image by image (RetinaNet), so that an image with few objects weighs as much as one with many.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import sigmoid_focal_loss

# mmdetection adds it to every divisor.
EPS = torch.finfo(torch.float32).eps


def retinanet_losses(
    logits: Tensor,
    codes: Tensor,
    anchors: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    matches: Sequence[Tensor],
    coder: BoxCoder,
) -> dict[str, Tensor]:
    """Focal loss and L1, both divided by the positives of the batch (at least one an image).

    Args:
        logits: [B, N, C].
        codes: [B, N, 4], encoded boxes.
        anchors: per image [N, 4].
        targets: per image boxes [m, 4] and labels [m] (0..C-1).
        matches: per image [N], see `assign`.
        coder: of the boxes.

    Returns:
        ``classification`` and ``bbox_regression``, scalars.
    """
    matched = torch.stack(list(matches))
    positive = matched >= 0
    divisor = positive.sum(1).clamp(min=1).sum().to(logits) + EPS
    counted = positive | (matched == Matcher.BELOW_LOW_THRESHOLD)
    wanted = torch.zeros_like(logits)
    box_loss = codes[:, :0].sum()
    for k, target in enumerate(targets):
        own = positive[k]
        objects = matched[k][own]
        wanted[k, own, target["labels"][objects]] = 1
        wanted_codes = coder.encode_single(target["boxes"].to(codes)[objects], anchors[k][own])
        box_loss = box_loss + F.l1_loss(codes[k][own], wanted_codes, reduction="sum")
    classification = sigmoid_focal_loss(logits[counted], wanted[counted], alpha=0.25, gamma=2, reduction="sum")
    return {"classification": classification / divisor, "bbox_regression": box_loss / divisor}


def proposal_losses(
    logits: Tensor, codes: Tensor, positive: Tensor, negative: Tensor, wanted_codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy over the sampled anchors and L1 over the positive ones.

    Args:
        logits: [B, N].
        codes: [B, N, 4].
        positive, negative: bool [B, N], the sample.
        wanted_codes: [B, N, 4]; only those of positive anchors count.

    Returns:
        Two scalars, both divided by the number of samples (each kind at least one an image).
    """
    divisor = (positive.sum(1).clamp(min=1) + negative.sum(1).clamp(min=1)).sum().to(logits) + EPS
    sampled = positive | negative
    objectness = F.binary_cross_entropy_with_logits(logits[sampled], positive[sampled].to(logits), reduction="sum")
    boxes = F.l1_loss(codes[positive], wanted_codes[positive], reduction="sum")
    return objectness / divisor, boxes / divisor


def box_head_losses(
    logits: Tensor, codes: Tensor, labels: Sequence[Tensor], wanted_codes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all candidates and L1 over those with an object, both divided by the number of candidates.

    Args:
        logits: [n, 1 + C], the background first.
        codes: [n, 4 (1 + C)], a box for every class.
        labels: per image int64, 0 for the background.
        wanted_codes: per image [n_i, 4].
    """
    classes = torch.cat(list(labels))
    divisor = max(len(classes), 1) + EPS
    positive = torch.where(classes > 0)[0]
    own = codes.unflatten(1, (-1, 4))[positive, classes[positive]]
    boxes = F.l1_loss(own, torch.cat(list(wanted_codes))[positive], reduction="sum")
    return F.cross_entropy(logits, classes, reduction="sum") / divisor, boxes / divisor


def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Mean binary cross-entropy of the labelled class's mask; 0 where there is none.

    Args:
        logits: [n, classes, S, S].
        labels: [n], which channel counts.
        wanted: [n, S, S], 0 or 1.
    """
    if not len(labels):
        return logits.sum() * 0
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted.to(own))
