"""torchvision's detectors over our pyramid: one training step each, odd batches, mixed precision, options."""

import pytest
import torch
from torch import Tensor

from evmamba.errors import UserError
from evmamba.tasks.detection.detectors import DETECTORS, build_detector

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


@pytest.mark.parametrize("name", DETECTORS)
def test_a_training_step_moves_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name, "efficientvmamba_t", 3, **SMALL).train()
    losses = detector([torch.rand(3, 70, 90), torch.rand(3, 64, 64)], targets(name))
    assert all(torch.isfinite(value) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    without = [key for key, parameter in detector.named_parameters() if parameter.grad is None]
    assert without == []
    assert ("loss_mask" in losses) == (name == "maskrcnn")


@pytest.mark.parametrize(("name", "steps"), [("retinanet", 30), ("maskrcnn", 60)])
def test_training_lowers_the_loss_and_finds_the_objects(name: str, steps: int) -> None:
    """A bright square on noise, overfitted: the label that comes out is the one that went in."""
    torch.manual_seed(0)
    detector = build_detector(name, "resnet10t", 3, **SMALL)
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


@pytest.mark.parametrize("name", DETECTORS)
def test_boxes_and_losses_stay_float32_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    detector = build_detector(name, "resnet10t", 3, **SMALL, score_threshold=0.0)
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
@pytest.mark.parametrize("name", DETECTORS)
def test_strips_thinner_than_a_pixel_after_resizing_train_and_predict(name: str, size: tuple[int, int]) -> None:
    """The short side of 3 pixels would be 0.77 of a pixel at a long side of 128."""
    torch.manual_seed(0)
    detector = build_detector(name, "resnet10t", 3, **SMALL, score_threshold=0.0).train()
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


def test_strips_keep_their_boxes_and_masks_in_place() -> None:
    transform = build_detector("retinanet", "resnet10t", 3, **SMALL).transform
    masks = torch.zeros(1, 2, 512, dtype=torch.uint8)
    masks[:, :, 128:384] = 1
    target = {"boxes": torch.tensor([[128.0, 0, 384, 2]]), "masks": masks}
    image, resized = transform.resize(torch.rand(3, 2, 512), target)
    assert tuple(image.shape) == (3, 1, 128)
    assert resized["boxes"].tolist() == [[32, 0, 96, 1]]
    assert resized["masks"].nonzero()[:, 2].tolist() == list(range(32, 96))
    assert target["boxes"].tolist() == [[128, 0, 384, 2]]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "retinenet"}, "unknown detector 'retinenet'; did you mean retinanet"),
        ({"channels": 20}, "multiple of 8"),
        ({"min_size": ()}, "min_size"),
        ({"min_size": (64, 200)}, "max_size"),
        ({"backbone": "efficientvmamba_q"}, "unknown backbone 'efficientvmamba_q'; did you mean efficientvmamba"),
    ],
)
def test_bad_options_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(**({"name": "retinanet", "backbone": "resnet10t", "num_classes": 3} | SMALL | change))
