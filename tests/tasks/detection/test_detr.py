"""RT-DETRv2 and D-FINE: the library's own detectors, on our backbones and in the house's calling convention."""

from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from evmamba.errors import UserError
from evmamba.launch.measure.cost import count
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.detection.detectors import build_detector
from evmamba.tasks.detection.detr import DETRS, LEAST_SIDE, Detr
from evmamba.tasks.detection.module import DetectionModule
from evmamba.tasks.detection.whole import whole_network

transformers = pytest.importorskip("transformers")

IMAGES = [torch.rand(3, 100, 140), torch.rand(3, 150, 120)]
TARGETS = [
    {"boxes": torch.tensor([[10.0, 10, 60, 70], [80, 5, 130, 90]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
]


def built(name: str, backbone: str = "resnet10t") -> Detr:
    torch.manual_seed(0)
    detector = build_detector(name, backbone, 3, min_size=(LEAST_SIDE,), channels=16, score_threshold=0.0)
    assert isinstance(detector, Detr)
    return detector


@pytest.mark.parametrize("name", DETRS)
def test_a_training_step_moves_every_parameter(name: str):
    detector = built(name, "efficientvmamba_t").train()
    losses = detector(IMAGES, TARGETS)
    assert {"loss_vfl", "loss_bbox", "loss_giou"} <= losses.keys()
    torch.stack(list(losses.values())).sum().backward()
    without = [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", DETRS)
def test_it_is_the_librarys_detector_with_the_librarys_loss(name: str):
    """The library's own, with timm's backbone inside: with our weights it has our outputs and our losses."""
    detector = built(name)
    ours = detector.transformer
    config = ours.config
    config.backbone_config = transformers.TimmBackboneConfig(backbone="resnet10t", out_indices=[2, 3, 4])
    theirs = type(ours)(config)
    own = {name: value for name, value in ours.state_dict().items() if "backbone" not in name}
    body = {f"model.backbone.model._backbone.{key}": v for key, v in detector.backbone.body.body.state_dict().items()}
    theirs.load_state_dict(own | body)
    squares = torch.randn(2, 3, LEAST_SIDE, LEAST_SIDE)
    with torch.no_grad():
        logits, boxes = detector.eval().predict(squares)
        found = theirs.eval()(squares)
    torch.testing.assert_close(logits, found.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes, found.pred_boxes, rtol=1e-4, atol=1e-5)

    labels = [
        {"class_labels": torch.tensor([1, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.5, 0.3, 0.6]])}
    ]
    torch.manual_seed(1)
    losses = detector.train()._losses(squares[:1], labels)
    torch.manual_seed(1)
    wanted = theirs.train()(squares[:1], labels=labels).loss
    torch.testing.assert_close(torch.stack(list(losses.values())).sum(), wanted, rtol=1e-3, atol=1e-3)


def test_boxes_come_in_the_images_own_pixels_and_the_best_first():
    detector = built("rtdetrv2").eval()
    logits = torch.full((300, 3), -9.0)
    logits[7, 2], logits[8, 0] = 4.0, 3.0
    boxes = torch.full((300, 4), 0.5)
    boxes[7], boxes[8] = torch.tensor([0.5, 0.25, 0.2, 0.1]), torch.tensor([0.0, 0.5, 0.5, 1.0])
    found = detector._best(logits, boxes, torch.zeros(3, 100, 200))
    assert found["labels"][:2].tolist() == [2, 0]
    torch.testing.assert_close(found["boxes"][:2], torch.tensor([[80.0, 20, 120, 30], [0, 0, 50, 100]]))
    assert len(found["scores"]) == 100
    assert (found["scores"].diff() <= 0).all()
    detector.score_threshold = 0.5
    assert len(detector._best(logits, boxes, torch.zeros(3, 100, 200))["scores"]) == 2


@pytest.mark.parametrize("name", DETRS)
def test_the_task_trains_and_predicts_with_it(name: str):
    torch.manual_seed(0)
    module = DetectionModule(3, "resnet10t", name, min_size=(LEAST_SIDE,), channels=16, score_threshold=0.0)
    loss, parts = module.train().training_loss({"images": IMAGES, "targets": TARGETS, "path": ["a", "b"]})
    assert loss.item() == pytest.approx(sum(float(value) for value in parts.values()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = module.eval()(IMAGES)
    for prediction, image in zip(found, IMAGES, strict=True):
        height, width = image.shape[-2:]
        assert prediction["boxes"].dtype == torch.float32
        assert (prediction["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert set(prediction["labels"].tolist()) <= {0, 1, 2}


def test_a_result_tells_the_squares(monkeypatch: pytest.MonkeyPatch):
    module = DetectionModule(3, "resnet10t", "dfine", min_size=(240, 224), channels=16)
    trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda found: found))
    monkeypatch.setattr(DetectionModule, "trainer", trainer)
    monkeypatch.setattr(DetectionModule, "_data", SimpleNamespace(category_ids=[1, 2, 3]))
    monkeypatch.setattr(module, "_detections", SimpleNamespace(gather=lambda category_ids: None))
    assert module.evaluation_end("test").protocol == {"squares": [256, 224]}


def test_it_is_counted_as_a_whole():
    network = whole_network("rtdetrv2", "resnet10t")
    assert network.size == (640, 640)
    body = build_backbone("resnet10t", features_only=True, out_indices=(1, 2, 3))
    assert count(network.counted, network.size).paper > 2 * count(body, network.size).paper


@pytest.mark.parametrize("name", DETRS)
def test_any_side_becomes_the_next_multiple_of_the_largest_stride(name: str):
    detector = build_detector(name, "resnet10t", 3, min_size=(224, 240, 130), channels=16)
    assert isinstance(detector, Detr)
    assert detector.sides == (224, 256, 160)
    with torch.no_grad():
        assert len(detector.eval()(IMAGES)) == 2


def test_images_too_small_for_its_queries_are_refused():
    with pytest.raises(UserError, match="min_size must be at least 128 for dfine, not 96"):
        build_detector("dfine", "resnet10t", 3, min_size=(96,))


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("evmamba.tasks.detection.detr.metadata.version", missing)
    with pytest.raises(UserError, match=r"detector rtdetrv2 needs transformers: pip install 'evmamba\[detr\]'"):
        build_detector("rtdetrv2", "resnet10t", 3)
