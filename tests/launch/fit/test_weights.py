"""The files that a training ends with, and who reads them."""

from pathlib import Path

import pytest
import torch

import evmamba
from evmamba.errors import UserError
from evmamba.launch.fit.weights import BACKBONE_FILE, WEIGHTS_FILE, load_weights, save_weights
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.classification.module import ClassificationModule
from evmamba.tasks.detection.module import DetectionModule
from evmamba.tasks.segmentation.module import SegmentationModule


def classifier(backbone: str = "resnet10t", num_classes: int = 2) -> ClassificationModule:
    return ClassificationModule(backbone, num_classes)


def test_a_run_reads_what_another_left(tmp_path: Path):
    trained, fresh = classifier(), classifier()
    save_weights(trained, tmp_path)
    load_weights(fresh, tmp_path)
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("backbone", ["efficientvmamba_t", "resnet10t"])
def test_the_backbone_alone_is_read_by_who_builds_one(tmp_path: Path, backbone: str):
    trained = classifier(backbone)
    save_weights(trained, tmp_path)
    file = str(tmp_path / BACKBONE_FILE)
    if backbone == "resnet10t":
        built = build_backbone(backbone, features_only=False, num_classes=2, checkpoint=file)
    else:
        built = evmamba.create_model(backbone, num_classes=2, pretrained=file)
    expected = trained.network.state_dict()
    for name, value in built.state_dict().items():
        # timm begins a classifier of other than 1000 classes anew
        assert torch.equal(value, expected[name]) or name.startswith("fc."), name


@pytest.mark.parametrize("detector", ["rtdetrv2", "dfine"])
def test_weights_with_two_names_are_read_by_both(tmp_path: Path, detector: str):
    pytest.importorskip("transformers")
    trained, fresh = (DetectionModule(2, "resnet10t", detector, min_size=(128,), channels=16) for _ in range(2))
    save_weights(trained, tmp_path)
    load_weights(fresh, tmp_path)
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in fresh.state_dict().items())


def test_a_task_that_nothing_starts_from_leaves_no_backbone(tmp_path: Path):
    save_weights(SegmentationModule("resnet10t", 2), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]


def test_weights_of_another_model_are_refused_with_their_file(tmp_path: Path):
    save_weights(classifier(num_classes=3), tmp_path)
    with pytest.raises(UserError, match=rf"{WEIGHTS_FILE} does not fit the model: 2 of another shape: network\.fc"):
        load_weights(classifier(), tmp_path)


def test_torn_and_missing_weights_are_told_apart(tmp_path: Path):
    with pytest.raises(UserError, match=rf"no {WEIGHTS_FILE} in .*: its training has not finished"):
        load_weights(classifier(), tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match=rf"cannot read the checkpoint .*{WEIGHTS_FILE}: torn"):
        load_weights(classifier(), tmp_path)
