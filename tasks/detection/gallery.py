"""Pictures of detections beside what was annotated."""

import colorsys
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou, nms

from evmamba.tasks.detection.metrics import MASK_THRESHOLD

PANEL_SIDE = 640  # longest side of one panel, pixels
TITLE_HEIGHT = 26
GAP = 8
MIN_SCORE = 0.3
# Shown of a detector that is not sure of anything.
FALLBACK_COUNT = 5
SAME_PLACE = 0.6  # intersection over union
SAME_OBJECT = 0.5  # likewise, of a detection and an object
MASK_OPACITY = 0.45


def draw_comparison(
    image: Tensor, prediction: dict[str, Tensor], target: dict[str, Any], class_names: list[str]
) -> Image.Image:
    """Draw the detections and, beside or under them, the annotated objects.

    Of detections that share a place, whatever their classes, only the best is drawn.

    Args:
        image: [3, H, W] in 0..1.
        prediction: boxes [n, 4], labels [n], scores [n], perhaps masks [n, 1, H, W] in 0..1; pixels of `image`.
        target: boxes [m, 4], labels [m], perhaps masks [m, H, W] of 0 and 1.
        class_names: by label.
    """
    prediction = distinct(prediction)
    sure = prediction["scores"] >= MIN_SCORE
    if sure.any():
        title = f"prediction: {_count(int(sure.sum()))} with score at least {MIN_SCORE:.2f}"
    else:
        sure[prediction["scores"].argsort(descending=True)[:FALLBACK_COUNT]] = True
        shown = int(sure.sum())
        title = f"prediction: the best {shown}, none reaches {MIN_SCORE:.2f}" if shown else "prediction: nothing found"
    found = {key: value[sure].cpu() for key, value in prediction.items()}
    truth = {key: value.cpu() for key, value in target.items() if key in ("boxes", "labels", "masks")}
    panels = [
        draw_objects(image, found, class_names, title),
        draw_objects(image, truth, class_names, f"ground truth: {_count(len(truth['boxes']))}"),
    ]
    width, height = panels[0].size
    beside = width < 1.5 * height
    step = (width + GAP, 0) if beside else (0, height + GAP)
    canvas = Image.new("RGB", (width + step[0], height + step[1]), "white")
    for k, panel in enumerate(panels):
        canvas.paste(panel, (k * step[0], k * step[1]))
    return canvas


def error_share(prediction: dict[str, Tensor], target: dict[str, Any]) -> float:
    """Which part of what is there or was found is wrong: (missed + false) / (missed + false + right), nan for nothing.

    A detection of `MIN_SCORE` or more is right when its class and place (`SAME_OBJECT`) are those of an object that no
    better detection took; `prediction` and `target` as in `draw_comparison`.
    """
    sure = prediction["scores"] >= MIN_SCORE
    boxes, labels = prediction["boxes"][sure].cpu(), prediction["labels"][sure].cpu()
    order = prediction["scores"][sure].cpu().argsort(descending=True)
    true_boxes, true_labels = target["boxes"].cpu(), target["labels"].cpu()
    overlaps = box_iou(boxes.float(), true_boxes.float()) * (labels[:, None] == true_labels[None])
    right = 0
    for k in order.tolist():
        if len(true_boxes) and overlaps[k].max() >= SAME_OBJECT:
            overlaps[:, int(overlaps[k].argmax())] = 0
            right += 1
    wrong = len(boxes) + len(true_boxes) - 2 * right
    return wrong / (wrong + right) if wrong + right else float("nan")


def distinct(prediction: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of detections that share a place, whatever their classes, only the best; in falling order of their scores."""
    kept = nms(prediction["boxes"], prediction["scores"], SAME_PLACE)
    return {key: value[kept] for key, value in prediction.items()}


def draw_objects(image: Tensor, objects: dict[str, Tensor], class_names: list[str], title: str) -> Image.Image:
    """Draw coloured masks, boxes and their names on an image, under a title.

    Args:
        image: [3, H, W] in 0..1.
        objects: boxes [n, 4], labels [n], perhaps scores [n] and masks [n, 1, H, W] or [n, H, W] in 0..1.
        class_names: by label.
        title: one line.
    """
    pixels = (image.detach().float().cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    if "masks" in objects:
        pixels = _tinted(pixels, objects["masks"], objects["labels"])
    scale = PANEL_SIDE / max(pixels.shape[:2])
    width, height = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    panel = Image.new("RGB", (width, height + TITLE_HEIGHT), "white")
    panel.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR), (0, TITLE_HEIGHT))
    draw = ImageDraw.Draw(panel)
    draw.text((4, TITLE_HEIGHT // 2), title, fill="black", anchor="lm", font=ImageFont.load_default(15))

    boxes = (objects["boxes"].float() * scale).tolist()
    labels = objects["labels"].tolist()
    scores = objects["scores"].tolist() if "scores" in objects else [None] * len(labels)
    # Large objects first, so that the names of small ones stay readable.
    order = sorted(range(len(boxes)), key=lambda k: -(boxes[k][2] - boxes[k][0]) * (boxes[k][3] - boxes[k][1]))
    for k in order:
        x1, y1, x2, y2 = boxes[k]
        color = _color(labels[k])
        draw.rectangle((x1, y1 + TITLE_HEIGHT, max(x1, x2 - 1), max(y1, y2 - 1) + TITLE_HEIGHT), outline=color, width=2)
    for k in order:
        text = class_names[labels[k]] + ("" if scores[k] is None else f" {scores[k]:.2f}")
        _tag(draw, text, boxes[k], _color(labels[k]), panel.size)
    return panel


def _tag(
    draw: ImageDraw.ImageDraw, text: str, box: list[float], color: tuple[int, int, int], size: tuple[int, int]
) -> None:
    """The name in the box's upper left corner, on its colour, inside the picture."""
    font = ImageFont.load_default(11)
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    x = min(max(box[0], 0), max(0, size[0] - width - 4))
    y = min(box[1] + TITLE_HEIGHT, size[1] - height - 3)
    draw.rectangle((x, y, x + width + 3, y + height + 2), fill=color)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    draw.text((x + 2, y + 1), text, fill="black" if bright else "white", font=font)


def _tinted(pixels: np.ndarray, masks: Tensor, labels: Tensor) -> np.ndarray:
    tinted = pixels.astype(np.float32)
    for mask, label in zip(masks, labels.tolist(), strict=True):
        inside = (mask.reshape(pixels.shape[:2]) >= MASK_THRESHOLD).numpy()
        tinted[inside] = (1 - MASK_OPACITY) * tinted[inside] + MASK_OPACITY * np.asarray(_color(label), np.float32)
    return tinted.round().astype(np.uint8)


def _color(label: int) -> tuple[int, int, int]:
    """Steps of the golden ratio on the colour wheel: neighbouring labels differ clearly, however many there are."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1.0, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _count(n: int) -> str:
    return f"{n} object" + ("" if n == 1 else "s")
