"""A trained segmentor on any image."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from evmamba.tasks.predictor import Predictor
from evmamba.tasks.segmentation.augment import normalise
from evmamba.tasks.segmentation.gallery import draw_prediction, palette
from evmamba.tasks.segmentation.inference import predict_labels
from evmamba.tasks.segmentation.module import SegmentationModule


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
        return {"classes": shares}, {"picture": draw_prediction(image, found, self.class_names, title), "label": label}
