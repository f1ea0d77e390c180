"""`evmamba explain`: from images and a network to pictures on the disk."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from evmamba.blocks import ES2D
from evmamba.errors import UserError, unknown_name
from evmamba.interpret import class_activation, receptive_field, step_maps
from evmamba.launch.fit.checkpoint_metadata import load_trained_network
from evmamba.launch.store.results import check_writable
from evmamba.launch.use.interpret_figures import (
    MAX_PATH_TOKENS,
    draw_activation,
    draw_receptive_field,
    draw_scan,
    draw_steps,
)
from evmamba.launch.use.predict_images import find_images
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.classification.data import NORMALISE, evaluation_transform
from evmamba.tasks.images import read_image

DEFAULT_SIZE = 224
# The receptive field is a mean; more images than this change it little.
MAX_IMAGES = 50


@dataclass
class Explained:
    """A network taken apart.

    Attributes:
        model: takes images [B, 3, H, W].
        last_map: from an image to the last map [B, C, h, w].
        classify: from the last map to logits; None where the network has no classifier.
        class_names: empty where they are not known.
        size: side of the input in pixels.
        num_classes: of the classifier.
    """

    model: nn.Module
    last_map: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None
    class_names: list[str]
    size: int
    num_classes: int = 0


def explain_images(given: argparse.Namespace) -> list[Path]:
    """Draw what the options of `evmamba explain` ask for; return the pictures' files.

    Raises:
        UserError: no network or two, no images, an unknown class, a network without maps.
    """
    if (given.checkpoint is None) == (given.backbone is None):
        raise UserError("name one network: --checkpoint FILE, or --backbone NAME")
    network = _of_checkpoint(given.checkpoint) if given.checkpoint else _of_name(given.backbone, given.weights)
    label = _label(network, given.label)
    files = list(find_images(given.images).values())[:MAX_IMAGES]
    check_writable(given.output, "--output")
    transform = evaluation_transform(given.size or network.size, 1.0)
    tensors = [transform(read_image(file))[None] for file in files]
    shown = _picture(tensors[0])

    figures: dict[str, Figure] = {}
    layers = [layer for layer in network.model.modules() if isinstance(layer, ES2D)]
    maps = step_maps(network.model, tensors[0])
    if layers:
        height, width = min(
            (tuple(m.steps.shape) for m in maps if max(m.steps.shape) <= MAX_PATH_TOKENS),
            key=lambda shape: -shape[0],
            default=(MAX_PATH_TOKENS // 2, MAX_PATH_TOKENS // 2),
        )
        layer = layers[0]
        kind = "four directions over the full map" if layer.scan == "ss2d" else f"atrous groups, step {layer.step}"
        title = f"{layer.scan.upper()}: {kind}; square: first token, cross: last; map of {height} x {width} tokens"
        figures["scan"] = draw_scan(shown, layer.token_order(height, width), height, width, title)
        figures["steps"] = draw_steps(shown, maps)
    field, areas = receptive_field(network.last_map, tensors)
    figures["receptive_field"] = draw_receptive_field(field, areas, len(tensors))
    if network.classify is not None:
        activation, label, probability = class_activation(network.last_map, network.classify, tensors[0], label)
        name = network.class_names[label] if network.class_names else f"class {label}"
        figures["activation"] = draw_activation(shown, activation, name, probability)

    written = []
    for name, figure in figures.items():
        written.append(given.output / f"{name}.png")
        figure.savefig(written[-1], dpi=130)
    return written


def _of_checkpoint(path: Path) -> Explained:
    trained = load_trained_network(path)
    task = TASKS[trained.task]
    model = trained.module.get_submodule(task.backbone_at)
    if not task.pyramid:
        return _classifier(model, trained.class_names, trained.data.get("image_size", DEFAULT_SIZE))
    return Explained(model, lambda image: model(image)[-1], None, [], DEFAULT_SIZE)


def _of_name(name: str, weights: Path | None) -> Explained:
    checkpoint = None if weights is None else str(weights)
    return _classifier(
        build_backbone(name, features_only=False, num_classes=1000, checkpoint=checkpoint).eval(), [], DEFAULT_SIZE
    )


def _classifier(model: nn.Module, class_names: list[str], size: int) -> Explained:
    body: Any = model
    with torch.no_grad():
        features = body.forward_features(torch.zeros(1, 3, size, size))
    if features.ndim != 4:
        raise UserError("this network has no maps to explain, only tokens: take one with stages")
    channels_last = features.shape[3] == body.num_features != features.shape[1]

    def turned(features: Tensor, there: bool) -> Tensor:
        if not channels_last:
            return features
        return features.permute(0, 3, 1, 2) if there else features.permute(0, 2, 3, 1)

    return Explained(
        model,
        lambda image: turned(body.forward_features(image), True),
        lambda features: body.forward_head(turned(features, False)),
        class_names,
        size,
        body.num_classes,
    )


def _label(network: Explained, name: str | None) -> int | None:
    if name is None:
        return None
    if network.classify is None:
        raise UserError("--class is for classifiers; this checkpoint is of another task")
    if name in network.class_names:
        return network.class_names.index(name)
    if name.isdecimal() and not network.class_names:
        if int(name) >= network.num_classes:
            raise UserError(f"--class {name}: the network has {network.num_classes} classes, counted from 0")
        return int(name)
    raise unknown_name("class", name, network.class_names or ["a number"])


def _picture(image: Tensor) -> Image.Image:
    mean, std = (torch.tensor(NORMALISE[key]).view(3, 1, 1) for key in ("mean", "std"))
    return to_pil_image((image[0] * std + mean).clamp(0, 1))
