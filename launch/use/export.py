"""Writing a network as the file that its name asks for."""

import json
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from evmamba.backbone import Backbone
from evmamba.checkpoints import save_checkpoint, write_safetensors
from evmamba.export import export_onnx, export_program
from evmamba.files import replacing, write_errors
from evmamba.launch.use.networks import Network


def write_network(network: Network, path: Path, size: tuple[int, int] | None = None) -> str:
    """Write a network as ``.onnx``, ``.pt2`` or ``.safetensors``, atomically, with what its users have to know.

    Args:
        network: what is written.
        path: the file.
        size: height and width of the one image that the graph is for; None: any sizes.

    Returns:
        What was written, in words.

    Raises:
        UserError: missing libraries, a file that cannot be written, or a graph that deviates from PyTorch.
    """
    facts = {
        "outputs": network.outputs,
        "class_names": json.dumps(network.class_names),
        "mean": json.dumps(IMAGENET_DEFAULT_MEAN),
        "std": json.dumps(IMAGENET_DEFAULT_STD),
    }
    weights = "trained" if network.trained else "random weights"
    if path.suffix == ".onnx":
        deviations = export_onnx(network.model, path, size=size, metadata=facts)
        sizes = ", ".join(f"{height}x{width}" for _, height, width in deviations)
        return f"{network.outputs}, {weights}; within {max(deviations.values()):.0e} of PyTorch at {sizes}"
    if path.suffix == ".pt2":
        _write_program(network.model, path, facts, size)
        needs = f"for one image of {size[0]}x{size[1]}" if size else "import evmamba before torch.export.load"
        return f"{network.outputs}, {weights}; {needs}"
    if isinstance(network.model, Backbone):
        save_checkpoint(network.model, path)
    else:
        write_safetensors(network.model.state_dict(), path, facts)
    return f"{network.outputs}, {weights}"


def _write_program(model: nn.Module, path: Path, facts: dict[str, str], size: tuple[int, int] | None) -> None:
    program = export_program(model, size=size)
    with write_errors(path), replacing(path) as partial:
        torch.export.save(program, partial, extra_files=facts)
