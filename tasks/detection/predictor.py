"""A trained detector on any image."""

from typing import Any

from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from evmamba.tasks.detection.gallery import distinct, draw_objects
from evmamba.tasks.detection.metrics import encode_mask
from evmamba.tasks.predictor import Predictor


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
