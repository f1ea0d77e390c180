"""A trained classifier on one image: the scores are those of the evaluation."""

import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.tasks.classification import ClassificationModule
from evmamba.tasks.classification.predictor import ClassificationPredictor

NAMES = ["ant", "bee", "cat"]


def test_scores_are_those_of_the_evaluation():
    torch.manual_seed(0)
    module = ClassificationModule("resnet10t", len(NAMES)).eval()
    predictor = ClassificationPredictor(module, NAMES, {"image_size": 64, "crop_ratio": 0.875}, torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    with torch.inference_mode():
        values, _ = predictor.predict(image, 0.0)
        resized = np.asarray(image.resize((102, 73), Image.Resampling.BICUBIC).crop((19, 4, 83, 68))) / 255
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        x = torch.from_numpy((resized - mean) / std).permute(2, 0, 1)[None].float()
        wanted = module(x).softmax(1)[0]
    got = {c["name"]: c["score"] for c in values["classes"]}
    assert [got[name] for name in NAMES] == pytest.approx(wanted.tolist(), abs=1e-4)
    assert list(got.values()) == sorted(got.values(), reverse=True)
