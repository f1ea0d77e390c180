"""Reading golden files."""

import torch


def per_image(golden: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The arrays NAME_0, NAME_1, ... of a golden file: one per image, or per level."""
    found = []
    while f"{name}_{len(found)}" in golden:
        found.append(golden[f"{name}_{len(found)}"])
    return found
