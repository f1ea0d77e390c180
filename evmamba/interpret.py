"""What a network does inside, as numbers to be drawn: scan paths, step sizes, receptive field, class activation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evmamba.blocks import ES2D
from evmamba.kernels.reference import merge_tokens

# Shares of the gradient whose smallest square around the centre is reported (arXiv 2203.06717, table 10).
AREA_SHARES = (0.2, 0.5, 0.99)


@dataclass
class StepMap:
    """Step sizes of one scan layer.

    Attributes:
        name: of the layer in the network.
        steps: [h, w], the mean over channels (and over the visits of a token) of delta = softplus(...), divided by its
            mean over the tokens with the same parameters. Above 1 a token is written into the state more
            than others, and what came before is forgotten more.
    """

    name: str
    steps: Tensor


def step_maps(model: nn.Module, image: Tensor) -> list[StepMap]:
    """The step sizes of every ES2D or SS2D layer for one image.

    Args:
        model: any network; one without such layers gives an empty list.
        image: [1, 3, H, W], normalised.
    """
    found: list[StepMap] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, ES2D)
            found.append(StepMap(name, _relative_steps(layer, layer.signal_and_gate(inputs[0])[0])))

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name)) for name, layer in model.named_modules() if isinstance(layer, ES2D)
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _relative_steps(layer: ES2D, signal: Tensor) -> Tensor:
    """Step of every token [h, w] of a signal [1, h, w, D]; see `StepMap`."""
    _, height, width, _ = signal.shape
    paths = layer.token_order(height, width).to(signal.device)
    steps = layer.step_sizes(signal)[0].mean(-1).unflatten(0, (-1, layer.pattern.sets))  # [K / sets, sets, L]
    inside = (paths >= 0).view_as(steps)
    means = (steps * inside).sum((0, 2)) / inside.sum((0, 2))
    relative = (steps / means[:, None]).view(1, *paths.shape, 1)
    return (merge_tokens(relative, paths, height, width) / layer.pattern.visits)[0, :, :, 0].cpu()


def receptive_field(last_map: Callable[[Tensor], Tensor], images: list[Tensor]) -> tuple[Tensor, dict[float, float]]:
    """Effective receptive field of the middle token of the last map (Luo et al., arXiv 1701.04128).

    The gradient of the token's positive part with respect to the image, absolute, summed over colours, averaged over
    images.

    Args:
        last_map: from an image [1, 3, H, W] to the network's last map [1, C, h, w].
        images: of one size.

    Returns:
        The field [H, W], its largest value 1; and for each of `AREA_SHARES` the area of the smallest square around its
        centre that holds so much of it, as a share of the image's (arXiv 2203.06717).
    """
    total: Tensor | None = None
    for image in images:
        image = image.clone().requires_grad_(True)
        features = last_map(image)
        middle = features[0, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(F.relu(middle).sum(), image)
        field = gradient[0].abs().sum(0)
        total = field if total is None else total + field
    assert total is not None
    return (total / total.max().clamp(min=1e-30)).cpu(), {share: _area(total, share) for share in AREA_SHARES}


def _area(field: Tensor, share: float) -> float:
    height, width = field.shape
    total = field.sum()
    sums = F.pad(field.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    for side in range(1, max(height, width) + 1):
        top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
        bottom, right = min(height, top + side), min(width, left + side)
        inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        if inside >= share * total:
            return (bottom - top) * (right - left) / (height * width)
    return 1.0


def class_activation(
    last_map: Callable[[Tensor], Tensor], classify: Callable[[Tensor], Tensor], image: Tensor, label: int | None
) -> tuple[Tensor, int, float]:
    """Grad-CAM: where the last map speaks for a class (Selvaraju et al., arXiv 1610.02391).

    Args:
        last_map: from an image [1, 3, H, W] to the last map [1, C, h, w].
        classify: from that map to logits [1, num_classes].
        image: [1, 3, H, W], normalised.
        label: the class; None takes the most probable one.

    Returns:
        The activation [h, w] in 0..1 (0 everywhere where nothing speaks for the class), the class and its probability.
    """
    with torch.no_grad():
        features = last_map(image)
    features.requires_grad_(True)
    logits = classify(features)
    label = int(logits.detach().argmax()) if label is None else label
    (gradient,) = torch.autograd.grad(logits[0, label], features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    activation = F.relu((weights * features).sum(1))[0].detach()
    probability = logits.detach().float().softmax(1)[0, label].item()
    return (activation / activation.max().clamp(min=1e-30)).cpu(), label, probability
