"""Pictures of what a network does inside, through matplotlib."""

from collections.abc import Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from evmamba.interpret import StepMap

# More tokens than this along a side make the paths' lines run together; a smaller map has the same order.
MAX_PATH_TOKENS = 24
PANEL = 3.0  # inches


def draw_scan(image: Image.Image, groups: Tensor, height: int, width: int, title: str) -> Figure:
    """The path of every group over the image: its tokens joined in order, dark where it begins, bright where it ends.

    Args:
        image: RGB.
        groups: pixel indices [K, L] of a map of height x width tokens, -1 for padding.
        height, width: tokens of the map.
        title: above the panels.
    """
    figure, axes = _panels(len(groups), image, title)
    for k, (axis, path) in enumerate(zip(axes, groups.tolist(), strict=True)):
        axis.imshow(image, alpha=0.45, extent=(0, width, height, 0))
        tokens = np.array([(p % width + 0.5, p // width + 0.5) for p in path if p >= 0])
        lines = LineCollection(list(np.stack([tokens[:-1], tokens[1:]], axis=1)), cmap="plasma", linewidths=1.2)
        lines.set_array(np.arange(len(tokens) - 1))
        axis.add_collection(lines)
        axis.scatter(*tokens.T, c=np.arange(len(tokens)), cmap="plasma", s=7, zorder=3)
        axis.scatter(*tokens[0], marker="s", s=36, color="black", zorder=4)
        axis.scatter(*tokens[-1], marker="X", s=40, color="black", zorder=4)
        axis.set_title(f"group {k + 1}: {len(tokens)} tokens", fontsize=9)
    return figure


def draw_steps(image: Image.Image, maps: Sequence[StepMap]) -> Figure:
    """The image, then every layer's step sizes on a scale of its own."""
    figure, axes = _panels(
        len(maps) + 1,
        image,
        "step size (delta) relative to its group's mean: bright tokens are written, dark ones pass",
    )
    axes[0].imshow(image)
    axes[0].set_title("image", fontsize=9)
    for axis, layer in zip(axes[1:], maps, strict=True):
        shown = axis.imshow(layer.steps.numpy(), cmap="magma", extent=(0, image.width, image.height, 0))
        axis.set_title(f"{layer.name}\n{layer.steps.shape[0]} x {layer.steps.shape[1]}", fontsize=8)
        figure.colorbar(shown, ax=axis, shrink=0.75).ax.tick_params(labelsize=7)
    return figure


def draw_receptive_field(field: Tensor, areas: dict[float, float], images: int) -> Figure:
    """The effective receptive field, logarithmic, and the areas of the squares that hold a share of it."""
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(np.log10(np.maximum(field.numpy(), 1e-4)), cmap="viridis", vmin=-4, vmax=0)
    figure.colorbar(shown, ax=axis, shrink=0.8, label="log10 of the gradient, largest = 1")
    shares = ", ".join(f"{share:.0%} in {area:.1%}" for share, area in areas.items())
    many = f"mean of {images} images" if images > 1 else "one image"
    axis.set_title(f"effective receptive field of the middle token ({many})\n{shares} of the image", fontsize=9)
    axis.set_axis_off()
    return figure


def draw_activation(image: Image.Image, activation: Tensor, name: str, probability: float) -> Figure:
    """The image, and where the last map speaks for a class."""
    figure, axes = _panels(2, image, f"class activation (Grad-CAM): {name}, probability {probability:.1%}")
    axes[0].imshow(image)
    axes[1].imshow(image)
    axes[1].imshow(
        activation.numpy(),
        cmap="inferno",
        alpha=0.6,
        interpolation="bilinear",
        extent=(0, image.width, image.height, 0),
        vmin=0,
        vmax=1,
    )
    return figure


def _panels(count: int, image: Image.Image, title: str) -> tuple[Figure, list]:
    columns = count if count <= 5 else 4
    rows = -(-count // columns)
    ratio = min(max(image.height / image.width, 0.4), 2.5)
    figure = Figure(figsize=(columns * PANEL, rows * (PANEL * ratio + 0.35) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.set_axis_off()
    return figure, axes[:count]
