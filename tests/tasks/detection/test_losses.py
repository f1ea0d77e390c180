"""The losses by their formulas; against mmdetection in test_retinanet.py, test_rcnn.py and test_masks.py."""

import math

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from evmamba.tasks.detection.losses import box_head_losses, mask_loss, proposal_losses, retinanet_losses


def test_without_an_object_the_mask_loss_is_zero_and_still_has_a_gradient() -> None:
    logits = torch.empty(0, 3, 28, 28, requires_grad=True)
    loss = mask_loss(logits, torch.zeros(0, dtype=torch.int64), torch.empty(0, 28, 28))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None


def test_an_image_with_few_objects_weighs_less_than_one_with_many() -> None:
    """One divisor for the batch: the sum of both images' losses over the sum of their positives."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [40, 40, 50, 50]])
    generator = torch.Generator().manual_seed(0)
    logits, codes = (torch.randn(2, 4, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    matches = [torch.tensor([0, 1, 0, -1]), torch.tensor([0, -1, -2, -1])]  # -1: background, -2: between
    targets = [
        {"boxes": anchors[:2].double() + 1, "labels": torch.tensor([2, 0])},
        {"boxes": anchors[:1].double() + 1, "labels": torch.tensor([1])},
    ]
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    double = [anchors.double()] * 2
    both = retinanet_losses(logits, codes, double, targets, matches, coder)
    alone = [
        retinanet_losses(logits[k : k + 1], codes[k : k + 1], double[:1], targets[k : k + 1], matches[k : k + 1], coder)
        for k in range(2)
    ]
    for name, loss in both.items():
        torch.testing.assert_close(loss, (3 * alone[0][name] + 1 * alone[1][name]) / 4, rtol=1e-6, atol=0)
    between = logits.clone()
    between[1, 2] += 5  # neither object nor background: it does not count
    again = retinanet_losses(between, codes, double, targets, matches, coder)
    assert torch.equal(again["classification"], both["classification"])


def test_only_the_boxes_of_the_labelled_class_count() -> None:
    logits, codes = torch.zeros(3, 3), torch.zeros(3, 12)
    codes[0, 8:] = 2.0  # class 2 of the first candidate, off by 2 in all four
    codes[1, 4:8] = 7.0  # of the second, which is background
    labels = [torch.tensor([2, 0]), torch.tensor([1])]
    wanted = [torch.zeros(2, 4), torch.zeros(1, 4)]
    classes, boxes = box_head_losses(logits, codes, labels, wanted)
    assert boxes.item() == pytest.approx(8 / 3)
    assert classes.item() == pytest.approx(math.log(3))


def test_proposals_are_divided_by_all_samples_of_the_batch() -> None:
    logits, codes = torch.zeros(2, 4), torch.zeros(2, 4, 4)
    positive = torch.tensor([[True, False, False, False], [False] * 4])
    negative = torch.tensor([[False, True, True, False], [True, True, True, True]])
    wanted = torch.ones(2, 4, 4)
    objectness, boxes = proposal_losses(logits, codes, positive, negative, wanted)
    # One positive counts for the image that has none.
    assert objectness.item() == pytest.approx(7 * math.log(2) / 8)
    assert boxes.item() == pytest.approx(4 / 8)
