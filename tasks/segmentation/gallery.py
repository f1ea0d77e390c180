"""Pictures of predictions: image, truth and prediction side by side, with a legend of the classes that occur."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evmamba.tasks.segmentation.metrics import IGNORE_INDEX

_PANEL_WIDTH = (240, 480)  # pixels; small images are enlarged, large ones reduced
_MAX_PANEL_HEIGHT = 480
_MARGIN, _CAPTION, _SWATCH = 12, 24, 14
_BACKGROUND, _TEXT, _MUTED = (255, 255, 255), (32, 33, 36), (110, 114, 120)
_OPACITY = 0.62
_MAX_LEGEND = 24


@cache
def palette(num_colours: int = IGNORE_INDEX) -> np.ndarray:
    """Fixed colours that are easy to tell apart, uint8 ``[num_colours, 3]``.

    Each colour is the one farthest, in the OKLab colour space, from all before it; so colour k does not depend on how
    many are asked for, and the first ones differ most.
    """
    steps = np.linspace(0, 255, 18).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    # An overlay must show on dark and on bright images, and grey must stay free for pixels without a label.
    usable = (lab[:, 0] > 0.42) & (lab[:, 0] < 0.92) & (chroma > 0.06)
    candidates, lab = candidates[usable], lab[usable]
    chosen = [int(np.argmin(np.abs(candidates.astype(int) - (30, 120, 220)).sum(1)))]  # begin with a calm blue
    distance = np.full(len(lab), np.inf)
    while len(chosen) < num_colours:
        distance = np.minimum(distance, np.square(lab - lab[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen]


def draw_comparison(
    image: Image.Image, truth: np.ndarray, prediction: np.ndarray, class_names: Sequence[str], title: str
) -> Image.Image:
    """One picture: image, truth and prediction side by side over a legend, most frequent classes first.

    Args:
        image: RGB, any size.
        truth: class indices ``[h, w]`` or 255 for pixels without a label, which are greyed out.
        prediction: class indices, same shape.
        class_names: name of class k at index k.
        title: a line above the panels.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")
    return _draw(image, {"truth": truth, "prediction": prediction}, class_names, title)


def draw_prediction(image: Image.Image, prediction: np.ndarray, class_names: Sequence[str], title: str) -> Image.Image:
    """As `draw_comparison`, without a truth."""
    return _draw(image, {"prediction": prediction}, class_names, title)


def _draw(image: Image.Image, labels: dict[str, np.ndarray], class_names: Sequence[str], title: str) -> Image.Image:
    width = min(max(image.width, _PANEL_WIDTH[0]), _PANEL_WIDTH[1])
    height = round(image.height * width / image.width)
    if height > _MAX_PANEL_HEIGHT:
        width, height = max(round(width * _MAX_PANEL_HEIGHT / height), 1), _MAX_PANEL_HEIGHT
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    panels = {"image": image} | {name: _overlay(image, label) for name, label in labels.items()}

    # Narrow panels would cut title and legend, so a picture is never narrower than its texts need.
    total_width = max(len(panels) * (width + _MARGIN) + _MARGIN, 640)
    legend = _legend(list(labels.values()), class_names, total_width - 2 * _MARGIN)
    top = _MARGIN + 2 * _CAPTION
    canvas = Image.new("RGB", (total_width, top + height + _MARGIN + legend.height + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, font=_font(15), fill=_TEXT)
    for k, (name, panel) in enumerate(panels.items()):
        left = _MARGIN + k * (width + _MARGIN)
        draw.text((left, _MARGIN + _CAPTION), name, font=_font(13), fill=_MUTED)
        canvas.paste(panel, (left, top))
    canvas.paste(legend, (_MARGIN, top + height + _MARGIN))
    return canvas


def _overlay(image: Image.Image, label: np.ndarray) -> Image.Image:
    """The image in grey under the labels' colours, with thin bright borders; unlabelled pixels stay plain grey."""
    label = np.asarray(Image.fromarray(label.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST))
    grey = 50 + 0.7 * np.asarray(image.convert("L"), dtype=np.float32)[..., None].repeat(3, axis=-1)
    colours = np.vstack([palette(), np.zeros((256 - IGNORE_INDEX, 3), np.uint8)])
    labelled = (label != IGNORE_INDEX)[..., None]
    mixed = np.where(labelled, (1 - _OPACITY) * grey + _OPACITY * colours[label], 0.5 * grey + 40)
    border = np.zeros(label.shape, bool)
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    border[1:] |= label[1:] != label[:-1]
    mixed[border] = 0.35 * mixed[border] + 0.65 * 255
    return Image.fromarray(mixed.round().astype(np.uint8))


def _legend(labels: Sequence[np.ndarray], class_names: Sequence[str], width: int) -> Image.Image:
    """Swatches and names in as many lines as they need."""
    counts = np.bincount(np.concatenate([label.ravel() for label in labels]), minlength=256)
    present = [k for k in np.argsort(-counts, kind="stable") if counts[k] and k != IGNORE_INDEX]
    entries = [(class_names[k], tuple(palette()[k].tolist())) for k in present[:_MAX_LEGEND]]
    if counts[IGNORE_INDEX]:
        entries.append(("not labelled", (128, 128, 128)))
    if len(present) > _MAX_LEGEND:
        entries.append((f"and {len(present) - _MAX_LEGEND} more classes", _BACKGROUND))

    font, line_height = _font(13), 22
    places: list[tuple[int, int]] = []
    x = y = 0
    for name, _ in entries:
        entry_width = _SWATCH + 6 + round(font.getlength(name)) + 16
        if x and x + entry_width > width:
            x, y = 0, y + line_height
        places.append((x, y))
        x += entry_width
    legend = Image.new("RGB", (width, y + line_height), _BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top + 3, left + _SWATCH - 1, top + 2 + _SWATCH), fill=colour)
        draw.text((left + _SWATCH + 6, top + 2), name, font=font, fill=_TEXT)
    return legend


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 ``[n, 3]`` to OKLab (Ottosson 2020), float64."""
    unit = rgb / 255.0
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T
