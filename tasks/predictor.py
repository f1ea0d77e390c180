"""A trained network on any image: what it sees, as plain values and as a picture."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from evmamba.tasks.module import TaskModule


class Predictor(ABC):
    """A network and what it takes to show an image to it.

    Args:
        module: trained, in evaluation mode.
        class_names: of the data it was trained on.
        data: arguments of the data module it was trained with.
        device: where it runs.
    """

    def __init__(
        self, module: TaskModule, class_names: list[str], data: Mapping[str, Any], device: torch.device
    ) -> None:
        self.module = module.to(device)
        self.class_names = class_names
        self.data = data
        self.device = device

    @abstractmethod
    def predict(self, image: Image.Image, min_score: float) -> tuple[dict[str, Any], dict[str, Image.Image]]:
        """Predict one RGB image of any size.

        Args:
            image: RGB.
            min_score: detections below are left out.

        Returns:
            JSON-able values, and pictures to be written: ``picture`` to look at, and perhaps ``label``, the answer
            itself as an image of numbers.
        """
