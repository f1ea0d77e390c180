"""A trained checkpoint on any image: what it sees, as plain values and as a picture."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from evmamba.launch.fit.described import Described, load_described
from evmamba.tasks.classification.data import evaluation_transform
from evmamba.tasks.classification.gallery import draw_prediction as draw_class
from evmamba.tasks.detection.gallery import distinct, draw_objects
from evmamba.tasks.detection.metrics import encode_mask
from evmamba.tasks.segmentation import SegmentationModule
from evmamba.tasks.segmentation.augment import normalise
from evmamba.tasks.segmentation.gallery import draw_prediction as draw_labels
from evmamba.tasks.segmentation.gallery import palette
from evmamba.tasks.segmentation.inference import predict_labels

TOP = 5


class Predictor(ABC):
    """A network and what it takes to show an image to it.

    Args:
        described: what `load_described` returns.
        device: where it runs.
    """

    def __init__(self, described: Described, device: torch.device) -> None:
        self.module = described.module.to(device)
        self.class_names = described.class_names
        self.data = described.data
        self.device = device

    @abstractmethod
    def predict(self, image: Image.Image, min_score: float) -> tuple[dict[str, Any], dict[str, Image.Image]]:
        """Predict one RGB image of any size.

        Args:
            image: RGB.
            min_score: detections below are left out.

        Returns:
            JSON-able values, and pictures to be written: ``picture`` to look at, and of segmentation ``label``, a
            palette PNG of class numbers.
        """


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
        return {"classes": classes}, {"picture": draw_class(image, classes[0]["name"], classes[0]["score"], None)}


class DetectionPredictor(Predictor):
    """``objects``: {name, score, box [x1, y1, x2, y2] in pixels, perhaps mask as pycocotools' RLE}, best first."""

    def predict(self, image: Image.Image, min_score: float) -> tuple[dict[str, Any], dict[str, Image.Image]]:
        pixels = pil_to_tensor(image).float() / 255
        found = distinct(self.module([pixels.to(self.device)])[0])
        found = {key: value[found["scores"] >= min_score].cpu() for key, value in found.items()}
        objects = []
        for k, label in enumerate(found["labels"].tolist()):
            entry: dict[str, Any] = {
                "name": self.class_names[label],
                "score": found["scores"][k].item(),
                "box": found["boxes"][k].tolist(),
            }
            if "masks" in found:
                entry["mask"] = encode_mask(found["masks"][k, 0])
            objects.append(entry)
        title = f"{len(objects)} object{'' if len(objects) == 1 else 's'} with score at least {min_score:.2f}"
        return {"objects": objects}, {"picture": draw_objects(pixels, found, self.class_names, title)}


class SegmentationPredictor(Predictor):
    """``classes``: {name: share of the pixels}, largest first."""

    def predict(self, image: Image.Image, min_score: float) -> tuple[dict[str, Any], dict[str, Image.Image]]:
        batch: Tensor = normalise(pil_to_tensor(image))[None].to(self.device)
        assert isinstance(self.module, SegmentationModule)
        labels = predict_labels(self.module, batch, (image.height, image.width), self.module.inference)[0]
        found = labels.to(torch.uint8).cpu().numpy()
        counts = np.bincount(found.ravel(), minlength=len(self.class_names))
        shares = {self.class_names[k]: round(counts[k] / found.size, 6) for k in np.argsort(-counts) if counts[k]}
        label = Image.fromarray(found)
        label.putpalette(palette().tobytes())
        title = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:3])
        return {"classes": shares}, {"picture": draw_labels(image, found, self.class_names, title), "label": label}


PREDICTORS: dict[str, type[Predictor]] = {
    "classification": ClassificationPredictor,
    "detection": DetectionPredictor,
    "segmentation": SegmentationPredictor,
}


def load_predictor(checkpoint: Path, device: torch.device | str = "cpu") -> Predictor:
    """Make a predictor of a checkpoint.

    Raises:
        UserError: see `evmamba.launch.fit.described.load_described`.
    """
    described = load_described(checkpoint)
    return PREDICTORS[described.task](described, torch.device(device))
