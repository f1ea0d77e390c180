"""Reading golden files."""

import os
from pathlib import Path

import pytest
import torch


def golden_file(name: str) -> Path:
    """One of the files made by mmdetection's and mmsegmentation's own code.

    `EVMAMBA_GOLDEN_HEADS` names another folder; the test is skipped where that one lacks the file.
    """
    other = os.environ.get("EVMAMBA_GOLDEN_HEADS")
    path = Path(other or Path(__file__).parents[1] / "assets" / "golden" / "heads") / name
    if other and not path.is_file():
        pytest.skip(f"no {name} in {other}")
    return path


def per_image(golden: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The arrays NAME_0, NAME_1, ... of a golden file: one per image, or per level."""
    found = []
    while f"{name}_{len(found)}" in golden:
        found.append(golden[f"{name}_{len(found)}"])
    return found
