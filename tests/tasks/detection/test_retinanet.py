"""RetinaNet against mmdetection's own code: assignment, targets, losses with gradients, detections."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import permute_and_flatten
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from evmamba.tasks.detection.assign import assign
from evmamba.tasks.detection.detectors import build_detector
from evmamba.tasks.detection.retinanet import ExtraLevels, PublishedRetinaNet

from ..golden import per_image

Golden = Callable[[str], dict[str, Tensor]]


def flat(maps: list[Tensor], values: int) -> Tensor:
    """Head outputs [B, anchors * values, h, w] of all levels as [B, N, values], by torchvision's own function."""
    return torch.cat([permute_and_flatten(m, len(m), m.shape[1] // values, values, *m.shape[-2:]) for m in maps], dim=1)


def detector(num_classes: int) -> PublishedRetinaNet:
    built = build_detector("retinanet", "resnet10t", num_classes, channels=8).double()
    assert isinstance(built, PublishedRetinaNet)
    return built


class LossCase:
    """The stored batch in the form that the detector's own methods take."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data
        self.classes = int(data["num_classes"])
        self.detector = detector(self.classes)
        self.maps = {kind: [m.requires_grad_() for m in per_image(data, kind)] for kind in ("cls", "reg")}
        sizes = [tuple(size) for size in data["img_shapes"].tolist()]
        images = ImageList(torch.empty(len(sizes), 3, *data["batch_shape"].tolist()), sizes)
        grid = self.detector.anchor_generator
        self.anchors = grid(images, self.maps["cls"])
        self.counting = grid.counting(sizes, self.maps["cls"])
        boxes = per_image(data, "gt_boxes")
        self.targets = [
            {"boxes": own, "labels": labels} for own, labels in zip(boxes, per_image(data, "gt_labels"), strict=True)
        ]

    def losses(self, images: slice = slice(None)) -> dict[str, Tensor]:
        return self.detector.losses(
            flat(self.maps["cls"], self.classes)[images],
            flat(self.maps["reg"], 4)[images],
            self.anchors[images],
            self.counting[images],
            self.targets[images],
        )


@pytest.fixture
def case(golden_heads: Golden) -> LossCase:
    return LossCase(golden_heads("retina_loss"))


def test_every_anchor_has_its_label_and_target(case: LossCase) -> None:
    for k, target in enumerate(case.targets):
        matches = assign(target["boxes"], case.anchors[k], case.detector.proposal_matcher, case.counting[k])
        labels = torch.full_like(matches, case.classes)
        positive = matches >= 0
        labels[positive] = target["labels"][matches[positive]]
        labels[matches < -1] = -1
        assert torch.equal(labels, case.data[f"labels_{k}"].long())
        assert torch.equal(torch.where(positive)[0], case.data[f"positives_{k}"])
        codes = case.detector.box_coder.encode_single(target["boxes"][matches[positive]], case.anchors[k][positive])
        torch.testing.assert_close(codes, case.data[f"box_targets_{k}"], rtol=0, atol=1e-9)


def test_losses_and_gradients_of_the_batch(case: LossCase) -> None:
    losses = case.losses()
    for name, kind, stored in (("classification", "cls", "cls"), ("bbox_regression", "reg", "bbox")):
        torch.testing.assert_close(losses[name], case.data[f"loss_{stored}"], rtol=1e-9, atol=0)
        gradients = torch.autograd.grad(losses[name], case.maps[kind], retain_graph=True, allow_unused=True)
        expected = per_image(case.data, f"grad_{kind}")
        largest = max(own.abs().max() for own in expected)
        for own, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=0, atol=float(1e-7 * largest))


def test_an_image_alone_is_divided_by_its_own_positives(case: LossCase) -> None:
    for k in range(len(case.targets)):
        losses = case.losses(slice(k, k + 1))
        torch.testing.assert_close(losses["classification"], case.data[f"alone_loss_cls_{k}"], rtol=1e-9, atol=0)
        torch.testing.assert_close(losses["bbox_regression"], case.data[f"alone_loss_bbox_{k}"], rtol=1e-9, atol=0)


def test_float32_losses(golden_heads: Golden) -> None:
    data = golden_heads("retina_loss")
    exact = ("loss_cls", "loss_bbox")
    case = LossCase({key: value.float() if value.dtype == torch.float64 else value for key, value in data.items()})
    losses = case.losses()
    for own, name in zip((losses["classification"], losses["bbox_regression"]), exact, strict=True):
        assert own.dtype == torch.float32
        assert own.item() == pytest.approx(data[f"{name}_float32"].item(), rel=2e-6)


def test_detections_in_resized_and_original_pixels(golden_heads: Golden) -> None:
    data = golden_heads("retina_infer")
    classes = int(data["num_classes"])
    network = detector(classes).eval()
    maps = {kind: per_image(data, kind) for kind in ("cls", "reg")}
    sizes = [tuple(size) for size in data["img_shapes"].tolist()]
    own_sizes = [tuple(size) for size in data["ori_shapes"].tolist()]
    images = ImageList(torch.empty(len(sizes), 3, *data["batch_shape"].tolist()), sizes)
    anchors = network.anchor_generator(images, maps["cls"])
    per_level = [m.shape[1] // classes * m.shape[-2] * m.shape[-1] for m in maps["cls"]]
    found = []
    for k, size in enumerate(sizes):
        logits, codes = flat(maps["cls"], classes)[k], flat(maps["reg"], 4)[k]
        found.append(network.detections(*(x.split(per_level) for x in (logits, codes, anchors[k])), size))
        torch.testing.assert_close(found[k]["boxes"], data[f"boxes_resized_{k}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[k]["scores"], data[f"scores_{k}"], rtol=0, atol=1e-9)
        assert torch.equal(found[k]["labels"], data[f"labels_{k}"])
    brought = network.transform.postprocess(found, sizes, own_sizes)
    for k, own in enumerate(brought):
        torch.testing.assert_close(own["boxes"], data[f"boxes_original_{k}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn"])
def test_the_pyramid_and_its_extra_levels(golden_heads: Golden, kind: str) -> None:
    """RetinaNet's last level has no ReLU before it; Mask R-CNN's is every second pixel."""
    data = golden_heads(f"fpn_{kind}")
    inputs = [x.requires_grad_() for x in per_image(data, "x")]
    used = inputs[1:] if kind == "retinanet" else inputs
    widths, channels = [x.shape[1] for x in used], len(data["sd_lateral_convs.0.conv.bias"])
    top = ExtraLevels(widths[-1], channels) if kind == "retinanet" else LastLevelMaxPool()
    pyramid = FeaturePyramidNetwork(widths, channels, top)
    built = build_detector(kind, "resnet10t", 2, channels=8).backbone.fpn
    assert type(built) is FeaturePyramidNetwork
    assert type(built.extra_blocks) is type(top)
    layers = {f"lateral_convs.{k}": pyramid.inner_blocks[k][0] for k in range(len(used))}
    layers |= {f"fpn_convs.{k}": pyramid.layer_blocks[k][0] for k in range(len(used))}
    if kind == "retinanet":
        layers |= {"fpn_convs.3": pyramid.extra_blocks.p6, "fpn_convs.4": pyramid.extra_blocks.p7}
    for name, layer in layers.items():
        layer.load_state_dict({part: data[f"sd_{name}.conv.{part}"] for part in ("weight", "bias")})
    outputs = list(pyramid.double()({str(k): x for k, x in enumerate(used)}).values())
    expected = per_image(data, "y")
    for own, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-10)
    total = sum((own * weight).sum() for own, weight in zip(outputs, per_image(data, "loss_weight"), strict=True))
    gradients = torch.autograd.grad(total, used)
    for own, wanted in zip(gradients, per_image(data, "grad_x")[-len(used) :], strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-10)


def test_levels_of_as_many_channels_as_the_backbone_still_start_from_its_last_map() -> None:
    """torchvision takes the pyramid's own map where the widths happen to agree."""
    fpn = build_detector("retinanet", "resnet10t", 2, channels=512).backbone.fpn
    level, last = torch.rand(1, 512, 4, 4), torch.rand(1, 512, 4, 4)
    outputs, _ = fpn.extra_blocks([level], [last], ["2"])
    assert torch.equal(outputs[1], fpn.extra_blocks.p6(last))
