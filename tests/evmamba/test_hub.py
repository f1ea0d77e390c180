"""The Hugging Face hub's format: a folder brings a network back as it was."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from evmamba import EfficientVMamba, FeaturePyramid, create_model

SMALL = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EfficientVMamba, {"num_classes": 5, "layout": "EIIE", "scan": "ss2d", "drop_path_rate": 0.1}),
        (FeaturePyramid, {"out_indices": (1, 3), "fusion": False, "in_chans": 1}),
    ],
)
def test_what_is_saved_comes_back(kind: type, options: dict, tmp_path: Path):
    torch.manual_seed(0)
    model = kind(**SMALL, **options).eval()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    again = kind.from_pretrained(tmp_path)
    image = torch.randn(1, options.get("in_chans", 3), 40, 56)
    with torch.no_grad():
        wanted, got = model(image), again(image)
    for a, b in zip(*((x if isinstance(x, list) else [x]) for x in (wanted, got)), strict=True):
        assert torch.equal(a, b)
    assert not again.training
    assert [type(stage.blocks[0]) for stage in again.stages] == [type(stage.blocks[0]) for stage in model.stages]


def test_a_new_classifier_is_saved_as_it_is(tmp_path: Path):
    model = create_model("efficientvmamba_t", num_classes=1000)
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_classes"] == 7
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    again = EfficientVMamba.from_pretrained(tmp_path)
    assert torch.equal(again.head.fc.weight, weights["head.fc.weight"])
    assert len(again.head.fc.weight) == 7


def test_weights_of_another_network_are_refused(tmp_path: Path):
    EfficientVMamba(**SMALL, num_classes=5).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        EfficientVMamba.from_pretrained(tmp_path, num_classes=6)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
        EfficientVMamba.from_pretrained(tmp_path, dims=(16, 16, 24, 32), strict=True)
