"""What an evaluation found: the one value by which it leaves a module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

GALLERY_FOLDER = "gallery"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation over all processes; files and pictures are held by the first one only.

    Attributes:
        metrics: by name, without the stage, in [0, 1], as computed: Lightning rounds what is logged to float32.
        details: JSON-able extras (per class, confusion matrix, counts).
        protocol: how images became predictions, where that is not the plain way.
        files: name -> what writes this file to a path.
        pictures: name without suffix -> picture of a prediction.
    """

    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)

    def write(self, folder: Path) -> list[str]:
        """Write files and pictures into a folder; return the pictures' names in it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in self.files.items():
            write(folder / name)
        written = []
        for name, picture in self.pictures.items():
            written.append(f"{GALLERY_FOLDER}/{name}.jpg")
            (folder / GALLERY_FOLDER).mkdir(exist_ok=True)
            picture.convert("RGB").save(folder / written[-1], quality=88)
        return written
