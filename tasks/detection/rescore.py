"""Average precision again, from the detections that a test kept and the annotations themselves, by pycocotools."""

from collections.abc import Collection
from pathlib import Path

from evmamba.errors import UserError, first_line
from evmamba.tasks.detection.annotations import load_coco_json
from evmamba.tasks.detection.data import DetectionData
from evmamba.tasks.detection.metrics import evaluate_coco
from evmamba.tasks.detection.module import BOX_FILE, MASK_FILE
from evmamba.tasks.per_image import PerImage
from evmamba.tasks.plain_files import read_json


def rescore(folder: Path, data: DetectionData, images: PerImage) -> dict[str, float]:
    """Evaluate kept detections.

    Args:
        folder: of the result.
        data: what it says it was tested on.
        images: what it kept of every image, which names those that count.

    Returns:
        Metrics by their names in results.

    Raises:
        UserError: no detections there, or something else in their file.
    """
    counted: Collection[str] = set(images.images)
    ids = [image["id"] for image in load_coco_json(data.test_file)["images"] if str(image["id"]) in counted]
    metrics: dict[str, float] = {}
    for name, kind, prefix in ((BOX_FILE, "bbox", ""), (MASK_FILE, "segm", "mask_")):
        if kind == "segm" and not (folder / name).is_file():
            continue
        try:
            found = evaluate_coco(data.test_file, read_json(folder / name), ids, kind)
        except (AssertionError, KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder / name}: no detections of these images ({first_line(error)})") from error
        metrics |= {f"{prefix}{metric}": float(value) for metric, value in found.metrics().items()}
    return metrics
