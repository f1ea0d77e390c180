"""Writing a network as the file that its name asks for."""

import contextlib
import json
from pathlib import Path

import safetensors.torch
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evmamba.checkpoints import save_checkpoint
from evmamba.errors import UserError
from evmamba.export import export_onnx, export_program
from evmamba.launch.networks import Network
from evmamba.model import Trunk


def write_network(network: Network, path: Path) -> str:
    """Write a network as ``.onnx``, ``.pt2`` or ``.safetensors``, atomically, with what its users have to know.

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
        deviations = export_onnx(network.model, path, metadata=facts)
        sizes = ", ".join(f"{height}x{width}" for _, height, width in deviations)
        return f"{network.outputs}, {weights}; within {max(deviations.values()):.0e} of PyTorch at {sizes}"
    partial = path.with_name(f".{path.name}.partial{path.suffix}")  # torch.export looks at the suffix
    try:
        if path.suffix == ".pt2":
            torch.export.save(export_program(network.model), partial, extra_files=facts)
        elif isinstance(network.model, Trunk):
            save_checkpoint(network.model, partial)
        else:
            state = {name: value.detach().contiguous().cpu() for name, value in network.model.state_dict().items()}
            safetensors.torch.save_file(state, partial, metadata={"format": "pt"} | facts)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    needs = "; import evmamba before torch.export.load" if path.suffix == ".pt2" else ""
    return f"{network.outputs}, {weights}{needs}"
