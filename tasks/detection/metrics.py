"""COCO average precision: pycocotools decides, on the annotation file itself, for any number of processes. Where it is
asked for, hotcoco gives the same numbers to the last bit in a fraction of the time; tests hold it to that."""

import contextlib
import io
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from evmamba.errors import UserError
from evmamba.files import write_text
from evmamba.tasks.detection.annotations import categories, has_mask, load_coco_json
from evmamba.tasks.detection.per_image import matches_of
from evmamba.tasks.training.distributed import gather_to_first

# COCOeval.stats[:6]; the other six are recalls.
PRECISIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MAX_DETECTIONS = 100
MASK_THRESHOLD = 0.5
Evaluator = Literal["pycocotools", "hotcoco"]
# One image's boxes, scores, labels and encoded masks.
Kept = tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]


@dataclass(frozen=True)
class CocoScores:
    """What COCOeval says.

    Attributes:
        stats: its twelve numbers, as it prints them; -1 where the data has no such objects.
        per_class: AP and AP50 in [0, 1] by class name; None for a class without objects.
        images: how many the annotation file has.
        matches: arrays of `per_image.Matches`, where they are asked for.
    """

    stats: list[float]
    per_class: dict[str, dict[str, float | None]]
    images: int
    matches: Mapping[str, np.ndarray] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl in [0, 1], without those that the data has no objects for."""
        return {name: value for name, value in zip(PRECISIONS, self.stats, strict=False) if value >= 0}


class CocoDetections:
    """Predictions of this process, in original image coordinates; gathered once, at the end of an epoch."""

    def __init__(self) -> None:
        self._found: dict[int | str, Kept] = {}

    def add(self, image_id: int | str, prediction: dict[str, Tensor]) -> None:
        """Keep one image's prediction.

        Args:
            image_id: the annotation file's id.
            prediction: boxes [n, 4] (x1 y1 x2 y2, pixels), scores [n], labels [n] (0..C-1); masks [n, 1, H, W] in
                [0, 1] from a detector that has them.
        """
        best = prediction["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
        boxes, scores, labels = (prediction[key][best].cpu().numpy() for key in ("boxes", "scores", "labels"))
        rles = [encode_mask(mask[0]) for mask in prediction["masks"][best]] if "masks" in prediction else []
        self._found[image_id] = (boxes, scores, labels, rles)

    def gather(self, category_ids: tuple[int, ...]) -> tuple[list[int | str], list[dict], list[dict]] | None:
        """Bring all processes' predictions to rank 0 and forget them; every process must call it.

        Returns:
            On rank 0 the ids of the images seen, and COCO result entries with boxes and with masks; else None. Boxes
            and masks are apart because pycocotools takes an entry's box area for its mask's where both are given.
        """
        found = gather_to_first(self._found)
        self._found = {}
        if found is None:
            return None
        image_ids = sorted(found)
        boxes, masks = _entries(found, category_ids)
        return image_ids, boxes, masks

    def take(self, category_ids: tuple[int, ...]) -> tuple[list[dict], list[dict]]:
        """This process's COCO result entries, with boxes and with masks; forgets them. Nothing collective."""
        found, self._found = self._found, {}
        return _entries(found, category_ids)


def evaluate_coco(
    annotation_file: Path,
    detections: list[dict],
    image_ids: list[Any],
    iou_type: str,
    keep: bool = False,
    evaluator: Evaluator = "pycocotools",
) -> CocoScores:
    """Run COCOeval.

    Args:
        annotation_file: ground truth, with its crowds, areas and ids.
        detections: COCO result entries; not changed.
        image_ids: images to count, normally all of the file.
        iou_type: "bbox" or "segm".
        keep: return how every detection was matched, too.
        evaluator: "pycocotools" or "hotcoco".

    Raises:
        UserError: hotcoco is not installed.
    """
    content = load_coco_json(annotation_file, masks=iou_type == "segm")
    if iou_type == "segm":
        _give_empty_masks(content)
    with contextlib.redirect_stdout(io.StringIO()):  # they print their progress
        prepare = _prepare_hotcoco if evaluator == "hotcoco" else _prepare_pycocotools
        run = prepare(content, detections, image_ids, iou_type)
        run.evaluate()
        run.accumulate()
        run.summarize()
    # precision is [IoU thresholds, recalls, classes, areas, max detections]; all areas, 100 detections
    precision = np.asarray(run.eval["precision"])[:, :, :, 0, -1]
    per_class = {}
    for k, name in enumerate(categories(content)[1]):
        per_class[name] = {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
    stats = [float(value) for value in run.stats]
    matches = matches_of(_all_pairs(run) if evaluator == "hotcoco" else run) if keep else {}
    return CocoScores(stats, per_class, len(content["images"]), matches)


def _prepare_pycocotools(content: dict[str, Any], detections: list[dict], image_ids: list[Any], iou_type: str) -> Any:
    truth = _coco(content)
    if detections:
        found = truth.loadRes([dict(entry) for entry in detections])
    else:  # loadRes looks at the first entry
        found = _coco({"images": content["images"], "categories": content["categories"], "annotations": []})
    run = COCOeval(truth, found, iou_type)
    run.params.imgIds = image_ids
    return run


def _prepare_hotcoco(content: dict[str, Any], detections: list[dict], image_ids: list[Any], iou_type: str) -> Any:
    try:
        import hotcoco
    except ModuleNotFoundError as error:
        raise UserError("evaluator hotcoco is not installed; in evmamba's folder: pip install '.[hotcoco]'") from error
    # Its ids are whole numbers; equal detections count in the order of the images' ids.
    number = {image_id: n for n, image_id in enumerate(sorted(image["id"] for image in content["images"]), start=1)}
    whole = {"images": [image | {"id": number[image["id"]]} for image in content["images"]]}
    whole["categories"] = [category | {"id": int(category["id"])} for category in content["categories"]]
    whole["annotations"] = [
        entry
        | {"id": int(entry["id"]), "image_id": number[entry["image_id"]], "category_id": int(entry["category_id"])}
        for entry in content["annotations"]
    ]
    truth = hotcoco.COCO(whole)
    found = truth.loadRes([entry | {"image_id": number[entry["image_id"]]} for entry in detections])
    run = hotcoco.COCOeval(truth, found, iou_type)
    run.params.imgIds = [number[image_id] for image_id in image_ids]
    return run


def _all_pairs(run: Any) -> Any:
    """A run of hotcoco's with an entry for every class, range of areas and image, as pycocotools has them; it leaves
    out those without objects and detections."""
    found = {(entry["category_id"], tuple(entry["aRng"]), entry["image_id"]): entry for entry in run.evalImgs if entry}
    parameters = run.params
    keys = itertools.product(parameters.catIds, map(tuple, parameters.areaRng), parameters.imgIds)
    return SimpleNamespace(params=parameters, evalImgs=[found.get(key) for key in keys])


def write_detections(path: Path, detections: list[dict]) -> None:
    """Dump result entries as pycocotools' loadRes reads them, floats to the last digit."""
    write_text(path, json.dumps(detections))


def _entries(found: dict[int | str, Kept], category_ids: tuple[int, ...]) -> tuple[list[dict], list[dict]]:
    boxes, masks = [], []
    for image_id in sorted(found):
        corners, scores, labels, rles = found[image_id]
        for k, (x1, y1, x2, y2) in enumerate(corners.astype(np.float64).tolist()):
            entry = {"image_id": image_id, "category_id": category_ids[labels[k]], "score": float(scores[k])}
            boxes.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
            if rles:
                masks.append(entry | {"segmentation": rles[k]})
    return boxes, masks


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """A mask [H, W] of probabilities as pycocotools' run-length code."""
    rle = mask_utils.encode(np.asfortranarray((mask >= MASK_THRESHOLD).cpu().numpy(), dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _coco(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def _give_empty_masks(content: dict[str, Any]) -> None:
    """An object without a mask stays an object that nobody can find; pycocotools alone would fail on it."""
    size = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for annotation in content["annotations"]:
        if not has_mask(annotation):
            height, width = size[annotation["image_id"]]
            annotation["segmentation"] = {"size": [height, width], "counts": [height * width]}


def _mean(precision: np.ndarray) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None
