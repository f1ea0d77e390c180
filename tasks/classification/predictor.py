"""A trained classifier on any image."""

from typing import Any

from PIL import Image

from evmamba.tasks.classification.data import evaluation_transform
from evmamba.tasks.classification.gallery import draw_prediction
from evmamba.tasks.predictor import Predictor

TOP = 5


class ClassificationPredictor(Predictor):
    """``classes``: the five most probable ones, {name, score}."""

    def predict(self, image: Image.Image, min_score: float) -> tuple[dict[str, Any], dict[str, Image.Image]]:
        transform = evaluation_transform(self.data["image_size"], self.data["crop_ratio"])
        scores = self.module(transform(image)[None].to(self.device))[0].float().softmax(0)
        best, which = scores.topk(min(TOP, len(scores)))
        classes = [
            {"name": self.class_names[k], "score": score}
            for k, score in zip(which.tolist(), best.tolist(), strict=True)
        ]
        return {"classes": classes}, {"picture": draw_prediction(image, classes[0]["name"], classes[0]["score"], None)}
