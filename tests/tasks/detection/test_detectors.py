"""Detectors over our pyramid, by either set of rules: training steps, odd batches, mixed precision, heads, options."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead, permute_and_flatten

from evmamba.errors import UserError
from evmamba.tasks.detection.detectors import RULES, build_detector

from ..golden import per_image

WITH_ANCHORS = ("retinanet", "fasterrcnn", "maskrcnn")
SMALL = {"min_size": (64,), "max_size": 128, "channels": 16, "group_norm": True, "anchor_scale": 0.5}


def targets(name: str) -> list[dict[str, Tensor]]:
    first = 0 if name == "retinanet" else 1
    masks = torch.zeros(2, 70, 90, dtype=torch.uint8)
    masks[0, 10:40, 8:50] = 1
    masks[1, 30:60, 40:80] = 1
    return [
        {
            "boxes": torch.tensor([[8.0, 10, 50, 40], [40, 30, 80, 60]]),
            "labels": torch.tensor([first, first + 2]),
            "masks": masks,
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
        },
    ]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_a_training_step_moves_every_parameter(name: str, rules: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name, "efficientvmamba_t", 3, rules=rules, **SMALL).train()
    losses = detector([torch.rand(3, 70, 90), torch.rand(3, 64, 64)], targets(name))
    assert all(torch.isfinite(value) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    without = [key for key, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []
    assert ("loss_mask" in losses) == (name == "maskrcnn")


@pytest.mark.parametrize(
    ("name", "rules", "steps"),
    [
        ("retinanet", "mmdetection", 60),
        ("retinanet", "torchvision", 30),
        ("maskrcnn", "mmdetection", 120),
        ("maskrcnn", "torchvision", 60),
    ],
)
def test_training_lowers_the_loss_and_finds_the_objects(name: str, rules: str, steps: int) -> None:
    """A bright square on noise, overfitted: the label that comes out is the one that went in."""
    torch.manual_seed(0)
    detector = build_detector(name, "resnet10t", 3, rules=rules, **SMALL)
    image = 0.2 * torch.rand(3, 64, 64)
    image[:, 16:48, 16:48] += 0.7
    mask = (image.mean(0, keepdim=True) > 0.5).byte()
    label = 1 if name == "retinanet" else 2
    target = {"boxes": torch.tensor([[16.0, 16, 48, 48]]), "labels": torch.tensor([label]), "masks": mask}
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    detector.train()
    for _ in range(steps):
        loss = torch.stack(list(detector([image, image], [target, target]).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detector.train(False)
    with torch.no_grad():
        found = detector([image])[0]
    assert found["labels"][0] == label
    assert (found["boxes"][0] - target["boxes"][0]).abs().max() < 5
    if name == "maskrcnn":
        overlap = (found["masks"][0, 0] > 0.5) & (mask[0] > 0)
        assert overlap.sum() > 0.7 * mask.sum()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_boxes_and_losses_stay_float32_under_autocast(name: str, rules: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name, "resnet10t", 3, rules=rules, **SMALL, score_threshold=0.0)
    images = [torch.rand(3, 70, 90), torch.rand(3, 64, 64)]
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(images, targets(name))
        with torch.no_grad():
            found = detector.train(False)(images)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert {prediction["boxes"].dtype for prediction in found} == {torch.float32}
    # Corners on a bfloat16 grid would all be whole or half pixels here.
    assert (found[0]["boxes"] * 16 % 1 != 0).any()


@pytest.mark.parametrize("size", [(3, 500), (500, 3)], ids=["wide", "high"])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", WITH_ANCHORS)
def test_strips_thinner_than_a_pixel_after_resizing_train_and_predict(
    name: str, rules: str, size: tuple[int, int]
) -> None:
    """The short side of 3 pixels would be 0.77 of a pixel at a long side of 128."""
    torch.manual_seed(0)
    detector = build_detector(name, "resnet10t", 3, rules=rules, **SMALL, score_threshold=0.0).train()
    height, width = size
    boxes = torch.tensor([[width * 0.2, height * 0.2, width * 0.8, height * 0.8]])
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[:, height // 5 : height * 4 // 5 + 1, width // 5 : width * 4 // 5 + 1] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    image = torch.rand(3, height, width)
    losses = detector([image], [target])
    assert torch.isfinite(torch.stack(list(losses.values())).sum())
    with torch.no_grad():
        found = detector.train(False)([image])[0]
    assert len(found["boxes"])
    assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
    assert found["boxes"].max() > 100  # in the strip's own pixels
    if name == "maskrcnn":
        assert found["masks"].shape[-2:] == size


@pytest.mark.parametrize(("name", "strides"), [("retinanet", [8, 16, 32, 64, 128]), ("maskrcnn", [4, 8, 16, 32, 64])])
def test_pyramid_levels(name: str, strides: list[int]) -> None:
    detector = build_detector(name, "resnet10t", 3, **SMALL)
    maps = detector.backbone(torch.rand(1, 3, 128, 256))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 16, 128 // s, 256 // s) for s in strides]


def test_standard_heads_have_256_channels() -> None:
    retinanet = build_detector("retinanet", "resnet10t", 80)
    assert retinanet.head.classification_head.cls_logits.weight.shape == (9 * 80, 256, 3, 3)
    assert retinanet.backbone.fpn.extra_blocks.p6.weight.shape[:2] == (256, 512)  # from the backbone's last map
    maskrcnn = build_detector("maskrcnn", "resnet10t", 80)
    assert maskrcnn.roi_heads.box_head.fc6.weight.shape == (1024, 256 * 49)
    assert maskrcnn.roi_heads.mask_predictor.mask_fcn_logits.weight.shape[:2] == (81, 256)
    assert maskrcnn.transform.min_size == (800,)


def test_either_set_of_rules_takes_the_others_weights() -> None:
    for name in WITH_ANCHORS:
        ours, theirs = (build_detector(name, "resnet10t", 3, rules=rules, **SMALL) for rules in RULES)
        ours.load_state_dict(theirs.state_dict())


def load_head(head: nn.Module, data: dict[str, Tensor], prefix: str, names: dict[str, str]) -> nn.Module:
    """The stored parameters in our head, by its names of mmdetection's layers."""
    for theirs, own in names.items():
        layer = head.get_submodule(own)
        layer.load_state_dict({part: data[f"{prefix}_sd_{theirs}.{part}"] for part in ("weight", "bias")})
    return head.double()


def test_heads_compute_what_the_originals_do(golden_heads: Callable[[str], dict[str, Tensor]]) -> None:
    data = golden_heads("heads")
    convs = range(4)
    classes = len(data["retina_sd_retina_cls.bias"]) // 9
    names = {f"cls_convs.{k}.conv": f"classification_head.conv.{k}.0" for k in convs}
    names |= {f"reg_convs.{k}.conv": f"regression_head.conv.{k}.0" for k in convs}
    names |= {"retina_cls": "classification_head.cls_logits", "retina_reg": "regression_head.bbox_reg"}
    head = load_head(RetinaNetHead(data["retina_x_0"].shape[1], 9, classes), data, "retina", names)
    maps = per_image(data, "retina_x")
    found = {
        "cls": [head.classification_head([m]) for m in maps],
        "reg": [head.regression_head([m]) for m in maps],
    }
    for kind, outputs in found.items():
        for own, wanted in zip(outputs, per_image(data, f"retina_{kind}"), strict=True):
            values = 4 if kind == "reg" else classes
            flat = permute_and_flatten(wanted, len(wanted), 9, values, *wanted.shape[-2:])
            torch.testing.assert_close(own, flat, rtol=0, atol=1e-10)

    names = {"rpn_conv": "conv.0.0", "rpn_cls": "cls_logits", "rpn_reg": "bbox_pred"}
    outputs = load_head(RPNHead(data["rpn_x_0"].shape[1], 3), data, "rpn", names)(per_image(data, "rpn_x"))
    for kind, maps in zip(("cls", "reg"), outputs, strict=True):
        for own, wanted in zip(maps, per_image(data, f"rpn_{kind}"), strict=True):
            torch.testing.assert_close(own, wanted, rtol=0, atol=1e-10)

    channels, classes = data["mask_x_0"].shape[1], len(data["mask_sd_conv_logits.bias"])
    convolutions = MaskRCNNHeads(channels, (channels,) * 4, 1)
    layers = load_head(convolutions, data, "mask", {f"convs.{k}.conv": f"{k}.0" for k in convs})
    names = {"upsample": "conv5_mask", "conv_logits": "mask_fcn_logits"}
    predictor = load_head(MaskRCNNPredictor(channels, channels, classes), data, "mask", names)
    torch.testing.assert_close(predictor(layers(data["mask_x_0"])), data["mask_logits"], rtol=0, atol=1e-10)


def test_the_box_head_computes_what_the_original_does(golden_heads: Callable[[str], dict[str, Tensor]]) -> None:
    data = golden_heads("heads")
    width, classes = data["box_sd_fc_cls.weight"].shape[1], len(data["box_sd_fc_cls.bias"]) - 1
    layers = TwoMLPHead(data["box_x_0"][0].numel(), width)
    load_head(layers, data, "box", {"shared_fcs.0": "fc6", "shared_fcs.1": "fc7"})
    scores, boxes = nn.Linear(width, classes + 1), nn.Linear(width, 4 * classes)
    load_head(nn.ModuleDict({"scores": scores, "boxes": boxes}), data, "box", {"fc_cls": "scores", "fc_reg": "boxes"})
    hidden = layers(data["box_x_0"])
    torch.testing.assert_close(scores(hidden), data["box_cls"], rtol=0, atol=1e-10)
    torch.testing.assert_close(boxes(hidden), data["box_reg"], rtol=0, atol=1e-10)


def test_initial_values_are_mmdetections() -> None:
    """Normal, Xavier and Kaiming values by their standard deviation; see RULE.md's list."""
    torch.manual_seed(0)
    maskrcnn = build_detector("maskrcnn", "resnet10t", 80)
    retinanet = build_detector("retinanet", "resnet10t", 80)
    heads = maskrcnn.roi_heads
    deviations = [
        (retinanet.head.classification_head.cls_logits, 0.01),
        (retinanet.head.regression_head.conv[2][0], 0.01),
        (maskrcnn.rpn.head.conv[0][0], 0.01),
        (heads.box_predictor.cls_score, 0.01),
        (heads.box_predictor.bbox_pred, 0.001),
        (heads.box_head.fc6, (2 / (256 * 49 + 1024)) ** 0.5),
        (maskrcnn.backbone.fpn.inner_blocks[0][0], (2 / (64 + 256)) ** 0.5),
        (maskrcnn.backbone.fpn.layer_blocks[0][0], (2 / (512 * 9)) ** 0.5),
        (retinanet.backbone.fpn.extra_blocks.p6, (2 / ((512 + 256) * 9)) ** 0.5),
        (heads.mask_head[1][0], (2 / (256 * 9)) ** 0.5),
        (heads.mask_predictor.mask_fcn_logits, (2 / 81) ** 0.5),
    ]
    for layer, deviation in deviations:
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05), layer
        if layer is not retinanet.head.classification_head.cls_logits:
            assert not layer.bias.any()
    assert retinanet.head.classification_head.cls_logits.bias[0].item() == pytest.approx(-math.log(99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "retinenet"}, "unknown detector 'retinenet'; did you mean retinanet"),
        ({"rules": "mmdetect"}, "unknown rules 'mmdetect'; did you mean mmdetection"),
        ({"channels": 20}, "multiple of 8"),
        ({"min_size": ()}, "min_size"),
        ({"min_size": (64, 200)}, "max_size"),
        ({"backbone": "efficientvmamba_q"}, "unknown backbone 'efficientvmamba_q'; did you mean efficientvmamba"),
    ],
)
def test_bad_options_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(**({"name": "retinanet", "backbone": "resnet10t", "num_classes": 3} | SMALL | change))
