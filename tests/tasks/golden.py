"""Reading golden files."""

import os
from pathlib import Path

import torch


def golden_folder() -> Path:
    """Of the files made by mmdetection's and mmsegmentation's own code; `EVMAMBA_GOLDEN_HEADS` names another."""
    return Path(os.environ.get("EVMAMBA_GOLDEN_HEADS", Path(__file__).parents[1] / "assets" / "golden" / "heads"))


def per_image(golden: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The arrays NAME_0, NAME_1, ... of a golden file: one per image, or per level."""
    found = []
    while f"{name}_{len(found)}" in golden:
        found.append(golden[f"{name}_{len(found)}"])
    return found
