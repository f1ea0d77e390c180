"""What every task's predictor promises to who shows it an image."""

import json
from typing import Any

import pytest
import torch
from PIL import Image

from evmamba.tasks import TASKS
from evmamba.tasks.predictor import Predictor
from evmamba.tasks.record import load

NAMES = ["ant", "bee", "cat"]
SMALL: dict[str, dict[str, Any]] = {
    "classification": {},
    "detection": {"min_size": [96], "max_size": 128, "channels": 16, "score_threshold": 0.0},
    "segmentation": {"decoder_channels": 16, "aux_channels": 0},
}


def predictor(task: str) -> Predictor:
    torch.manual_seed(0)
    record = TASKS[task]
    module, _, kind = record.module.rpartition(".")
    network = load(f"{module}:{kind}")(backbone="resnet10t", num_classes=len(NAMES), **SMALL[task]).eval()
    data = {"image_size": 64, "crop_ratio": 0.875}
    return record.load("predictor")(network, NAMES, data, torch.device("cpu"))


@pytest.mark.parametrize("task", SMALL)
def test_an_image_of_any_shape_gives_plain_values_and_a_picture(task: str):
    for size in ((70, 50), (33, 97)):
        with torch.inference_mode():
            values, pictures = predictor(task).predict(Image.new("RGB", size, "teal"), 0.0)
        assert json.loads(json.dumps(values)) == values
        assert pictures.keys() <= {"picture", "label"}
        assert min(pictures["picture"].size) > 32


def test_a_predictor_has_to_predict():
    class Unfinished(Predictor):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished(torch.nn.Linear(1, 1), NAMES, {}, torch.device("cpu"))  # type: ignore[abstract, arg-type]
