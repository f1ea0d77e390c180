"""A trained segmentor on one image."""

import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.tasks.segmentation import SegmentationModule
from evmamba.tasks.segmentation.predictor import SegmentationPredictor

NAMES = ["ant", "bee", "cat"]


def test_shares_are_those_of_the_label_largest_first():
    torch.manual_seed(0)
    module = SegmentationModule("resnet10t", len(NAMES), decoder_channels=16, aux_channels=0).eval()
    predictor = SegmentationPredictor(module, NAMES, {}, torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    with torch.inference_mode():
        values, pictures = predictor.predict(image, 0.0)
    label = np.asarray(pictures["label"])
    assert label.shape == (50, 70)
    shares = list(values["classes"].values())
    assert shares == sorted(shares, reverse=True)
    counted = {name: float((label == k).mean()) for k, name in enumerate(NAMES)}
    assert values["classes"] == pytest.approx({name: share for name, share in counted.items() if share}, abs=1e-6)
