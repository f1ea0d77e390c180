"""A trained detector on one image."""

import numpy as np
import torch
from PIL import Image

from evmamba.tasks.detection import DetectionModule
from evmamba.tasks.detection.predictor import DetectionPredictor

NAMES = ["ant", "bee", "cat"]


def test_low_scores_are_left_out():
    torch.manual_seed(0)
    small = {"min_size": [96], "max_size": 128, "channels": 16, "score_threshold": 0.0}
    module = DetectionModule(num_classes=len(NAMES), backbone="resnet18", **small).eval()
    predictor = DetectionPredictor(module, NAMES, {}, torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    with torch.inference_mode():
        every = predictor.predict(image, 0.0)[0]["objects"]
        limit = every[len(every) // 2]["score"]
        some = predictor.predict(image, limit)[0]["objects"]
    assert 0 < len(some) < len(every)
    assert min(found["score"] for found in some) >= limit
    for found in every:
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 < x2 <= 70
        assert 0 <= y1 < y2 <= 50
