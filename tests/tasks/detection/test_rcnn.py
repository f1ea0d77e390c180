"""Region proposals and RoI heads against mmdetection's own code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from evmamba.tasks.detection.assign import OUTSIDE, assign
from evmamba.tasks.detection.detectors import build_detector
from evmamba.tasks.detection.losses import box_head_losses
from evmamba.tasks.detection.rcnn import AlignedRoIAlign, PublishedProposals, PublishedRoIHeads

from ..golden import per_image
from .test_retinanet import flat

Golden = Callable[[str], dict[str, Tensor]]


def proposals_network() -> PublishedProposals:
    rpn = build_detector("maskrcnn", "resnet10t", 2, channels=8).rpn
    assert isinstance(rpn, PublishedProposals)
    return rpn.double()


def roi_heads(num_classes: int) -> PublishedRoIHeads:
    heads = build_detector("maskrcnn", "resnet10t", num_classes, channels=8).roi_heads
    assert isinstance(heads, PublishedRoIHeads)
    return heads.double()


class ProposalCase:
    """The stored batch in the form that the network's own methods take."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data
        self.rpn = proposals_network()
        self.maps = {kind: [m.requires_grad_() for m in per_image(data, kind)] for kind in ("cls", "reg")}
        self.sizes = [tuple(size) for size in data["img_shapes"].tolist()]
        images = ImageList(torch.empty(len(self.sizes), 3, *data["batch_shape"].tolist()), self.sizes)
        self.anchors = self.rpn.anchor_generator(images, self.maps["cls"])
        self.counting = self.rpn.anchor_generator.counting(self.sizes, self.maps["cls"])
        self.logits, self.codes = flat(self.maps["cls"], 1)[..., 0], flat(self.maps["reg"], 4)


def test_every_anchor_of_the_proposals_has_its_object(golden_heads: Golden) -> None:
    case = ProposalCase(golden_heads("rpn_loss"))
    targets = [{"boxes": own} for own in per_image(case.data, "gt_boxes")]
    for k, matches in enumerate(case.rpn.matches(case.anchors, case.counting, targets)):
        assert torch.equal(matches, case.data[f"assigned_{k}"].long())
        assert (matches == OUTSIDE).any() == (case.counting[k] is not None)
        positive = matches >= 0
        assert torch.equal(torch.where(positive)[0], case.data[f"positives_{k}"])
        codes = case.rpn.box_coder.encode_single(targets[k]["boxes"][matches[positive]], case.anchors[k][positive])
        torch.testing.assert_close(codes, case.data[f"box_targets_{k}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["all", "sampled"])
def test_losses_of_the_proposals_and_their_gradients(golden_heads: Golden, mode: str) -> None:
    case = ProposalCase(golden_heads("rpn_loss"))
    targets = [{"boxes": own} for own in per_image(case.data, "gt_boxes")]
    matches = case.rpn.matches(case.anchors, case.counting, targets)
    states = torch.stack(per_image(case.data, f"{mode}_state"))
    losses = case.rpn.losses(case.logits, case.codes, case.anchors, targets, matches, states == 1, states == 0)
    for name, kind, stored in (("loss_objectness", "cls", "cls"), ("loss_rpn_box_reg", "reg", "bbox")):
        torch.testing.assert_close(losses[name], case.data[f"{mode}_loss_{stored}"], rtol=1e-9, atol=0)
        gradients = torch.autograd.grad(losses[name], case.maps[kind], retain_graph=True)
        expected = per_image(case.data, f"{mode}_grad_{kind}")
        largest = max(own.abs().max() for own in expected)
        for own, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=0, atol=float(1e-7 * largest))


def test_the_sample_of_anchors_is_as_large_as_configured_and_never_from_the_padding(golden_heads: Golden) -> None:
    case = ProposalCase(golden_heads("rpn_loss"))
    targets = [{"boxes": own} for own in per_image(case.data, "gt_boxes")]
    matches = torch.stack(case.rpn.matches(case.anchors, case.counting, targets))
    positive, negative = case.rpn.sample(list(matches))
    assert (matches[positive] >= 0).all()
    assert (matches[negative] == -1).all()
    expected = (matches >= 0).sum(1).clamp(max=128)
    assert torch.equal(positive.sum(1), expected)
    assert torch.equal(negative.sum(1), torch.minimum(256 - expected, (matches == -1).sum(1)))


@pytest.mark.parametrize("mode", ["train", "test"])
def test_proposals_and_their_order(golden_heads: Golden, mode: str) -> None:
    case = ProposalCase(golden_heads("rpn_proposals"))
    case.rpn.train(mode == "train")
    per_level = [m[0].numel() for m in case.maps["cls"]]
    for k, size in enumerate(case.sizes):
        parts = (x.split(per_level) for x in (case.logits[k], case.codes[k], case.anchors[k]))
        boxes, scores = case.rpn.propose(*parts, size)
        torch.testing.assert_close(boxes, case.data[f"{mode}_boxes_{k}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(scores, case.data[f"{mode}_scores_{k}"], rtol=0, atol=1e-9)


def test_regions_are_read_from_their_level_with_aligned_bins(golden_heads: Golden) -> None:
    data = golden_heads("roi_align")
    maps = [m.requires_grad_() for m in per_image(data, "map")]
    rois = data["rois"]
    images = int(rois[:, 0].max()) + 1
    boxes = [rois[rois[:, 0] == k, 1:] for k in range(images)]
    order = torch.cat([torch.where(rois[:, 0] == k)[0] for k in range(images)])
    total = torch.zeros((), dtype=torch.float64)
    for bins in (7, 14):
        pool = AlignedRoIAlign("0123", bins, (4, 8, 16, 32))
        assert torch.equal(pool.levels(rois[:, 1:]), data["levels"])
        pooled = pool({str(k): m for k, m in enumerate(maps)}, boxes, [])
        torch.testing.assert_close(pooled, data[f"pooled_{bins}"][order], rtol=0, atol=1e-9)
        total = total + (pooled * data[f"loss_weight_{bins}"][order]).sum()
    for own, wanted in zip(torch.autograd.grad(total, maps), per_image(data, "grad_map"), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-9)


def with_background(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """mmdetection's order, the background's score last and without a box, in ours, where it comes first with one."""
    return logits.roll(1, dims=1), torch.cat([codes.new_zeros(len(codes), 4), codes], dim=1)


def test_candidates_of_the_box_head_and_its_losses(golden_heads: Golden) -> None:
    data = golden_heads("box_head_loss")
    heads = roi_heads(int(data["num_classes"]))
    boxes, proposals = per_image(data, "gt_boxes"), per_image(data, "proposals")
    targets = [
        {"boxes": own, "labels": labels + 1} for own, labels in zip(boxes, per_image(data, "gt_labels"), strict=True)
    ]
    everything = [heads.assigned(own, target) for own, target in zip(proposals, targets, strict=True)]
    candidates, objects, labels = (list(column) for column in zip(*everything, strict=True))
    wanted = heads.wanted_codes(candidates, objects, targets)
    for k, own in enumerate(labels):
        assert torch.equal(assign(boxes[k], proposals[k], heads.proposal_matcher), data[f"assigned_{k}"].long())
        stored = data[f"labels_{k}"].long()
        assert torch.equal(own, torch.where(stored == data["num_classes"], 0, stored + 1))
        positive = own > 0
        torch.testing.assert_close(wanted[k][positive], data[f"box_targets_{k}"][positive], rtol=0, atol=1e-9)

    leaves = {kind: [x.requires_grad_() for x in per_image(data, kind)] for kind in ("cls", "reg")}
    logits, codes = with_background(torch.cat(leaves["cls"]), torch.cat(leaves["reg"]))
    losses = box_head_losses(logits, codes, labels, wanted)
    for loss, kind, stored_as in zip(losses, ("cls", "reg"), ("cls", "bbox"), strict=True):
        torch.testing.assert_close(loss, data[f"loss_{stored_as}"], rtol=1e-9, atol=0)
        gradients = torch.autograd.grad(loss, leaves[kind], retain_graph=True, allow_unused=True)
        for own, expected in zip(gradients, per_image(data, f"grad_{kind}"), strict=True):
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-9)


def test_faster_rcnn_leaves_the_low_quality_step_out(golden_heads: Golden) -> None:
    data = golden_heads("box_head_loss")
    matcher = build_detector("fasterrcnn", "resnet10t", 2, channels=8).roi_heads.proposal_matcher
    expected = per_image(data, "assigned_without_low_quality")
    assert not all(map(torch.equal, expected, per_image(data, "assigned")))
    for boxes, proposals, wanted in zip(
        per_image(data, "gt_boxes"), per_image(data, "proposals"), expected, strict=True
    ):
        assert torch.equal(assign(boxes, proposals, matcher), wanted.long())


def test_sampled_candidates_are_a_quarter_positive_at_most() -> None:
    heads = roi_heads(3)
    start = torch.rand(2000, 2).double() * 3000
    proposals = torch.cat([start, start + 20 + 40 * torch.rand(2000, 2).double()], dim=1)
    target = {"boxes": proposals[:300] + 1, "labels": torch.ones(300, dtype=torch.int64)}
    candidates, objects, labels = heads.candidates([proposals], [target])
    assert len(candidates[0]) == 512
    assert (labels[0] > 0).sum() == 128
    assert objects[0].max() < 300


def test_detections_of_the_box_head(golden_heads: Golden) -> None:
    data = golden_heads("roi_infer")
    heads = roi_heads(int(data["num_classes"])).eval()
    transform = build_detector("maskrcnn", "resnet10t", 2, channels=8).eval().transform
    sizes = [tuple(size) for size in data["img_shapes"].tolist()]
    logits, codes = with_background(torch.cat(per_image(data, "cls")), torch.cat(per_image(data, "reg")))
    columns = heads.postprocess_detections(logits, codes, per_image(data, "rois"), sizes)
    found = [dict(zip(("boxes", "scores", "labels"), own, strict=True)) for own in zip(*columns, strict=True)]
    for k, own in enumerate(found):
        torch.testing.assert_close(own["boxes"], data[f"boxes_resized_{k}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(own["scores"], data[f"scores_{k}"], rtol=0, atol=1e-9)
        assert torch.equal(own["labels"] - 1, data[f"labels_{k}"])
    brought = transform.postprocess(found, sizes, [tuple(size) for size in data["ori_shapes"].tolist()])
    for k, own in enumerate(brought):
        torch.testing.assert_close(own["boxes"], data[f"boxes_original_{k}"], rtol=0, atol=1e-6)
