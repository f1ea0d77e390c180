"""Label files: reading their indices as they are, and what the indices mean."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from evmamba.errors import UserError
from evmamba.tasks.images import FORMATS
from evmamba.tasks.segmentation.metrics import IGNORE_INDEX

MAX_CLASSES = IGNORE_INDEX  # indices 0..254, 255 stands for "counts nowhere"

# Pillow stretches grey values of 1, 2 and 4 bits to 0..255; a label is the number in the file.
_STRETCH = {"1": 255, "L;2": 85, "L;4": 17}


def read_label(path: Path) -> np.ndarray:
    """Read a label file: uint8 ``[h, w]``, the numbers as they stand in the file.

    8-bit (or less) grayscale and palette files hold labels; a palette's colours are decoration and are never looked at.

    Raises:
        UserError: missing or damaged file, RGB or 16-bit masks, lossy formats; names the file.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "JPEG":
                raise UserError(f"label {path} is a JPEG, whose compression changes labels; save it as PNG")
            if image.mode not in ("1", "L", "P"):
                raise UserError(
                    f"label {path} has mode {image.mode}; labels are 8-bit grayscale or palette PNGs whose pixels are "
                    "class numbers (convert colours or 16-bit values to class numbers first)"
                )
            raw_mode = _raw_mode(image)
            pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"label not found: {path}") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise UserError(f"cannot read label {path}: {str(error).strip() or type(error).__name__}") from error
    return pixels // _STRETCH[raw_mode] if raw_mode in _STRETCH else pixels


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the pixels are stored, e.g. "L;4"; must be asked before the image is decoded."""
    arguments = image.tile[0].args if image.tile else None
    return arguments if isinstance(arguments, str) else arguments[0] if arguments else image.mode


class LabelMap:
    """From label numbers in files to class indices ``0..C-1`` (or `IGNORE_INDEX`), and back.

    Args:
        num_classes: C, at most 255.
        reduce_zero_label: True: files number classes from 1 and 0 means "other", which counts nowhere (ADE20K);
            False: files number classes from 0. None: True unless `ignore_label` names another number than 0.
        ignore_label: number in the files that counts nowhere; None: only what `reduce_zero_label` says.

    Raises:
        UserError: options that contradict each other, too many classes.
    """

    def __init__(
        self, num_classes: int, reduce_zero_label: bool | None = None, ignore_label: int | None = None
    ) -> None:
        if not 1 <= num_classes <= MAX_CLASSES:
            raise UserError(f"data.num_classes must be in 1..{MAX_CLASSES} (labels are 8-bit), not {num_classes}")
        if ignore_label is not None and not 0 <= ignore_label <= 255:
            raise UserError(f"data.ignore_label must be a label in 0..255 or null, not {ignore_label}")
        if reduce_zero_label is None:
            reduce_zero_label = ignore_label in (None, 0)
        elif not reduce_zero_label and ignore_label == 0:
            raise UserError("data.ignore_label=0 contradicts data.reduce_zero_label=false, by which 0 is a class")
        self.num_classes = num_classes
        self.first = int(reduce_zero_label)
        if ignore_label is not None and self.first <= ignore_label < self.first + num_classes:
            raise UserError(f"data.ignore_label={ignore_label} lies among the {num_classes} classes ({self.range})")
        self.ignored = {0} if reduce_zero_label else set()
        if ignore_label is not None:
            self.ignored.add(ignore_label)
        self._table = np.full(256, IGNORE_INDEX, np.uint8)
        self._table[self.first : self.first + num_classes] = np.arange(num_classes)

    @property
    def range(self) -> str:
        """The labels that are classes, e.g. "1..11"."""
        return f"{self.first}..{self.first + self.num_classes - 1}"

    def is_valid(self, value: int) -> bool:
        return self.first <= value < self.first + self.num_classes or value in self.ignored

    def is_class(self, value: int) -> bool:
        return self.is_valid(value) and value not in self.ignored

    def to_index(self, label: np.ndarray) -> np.ndarray:
        """Numbers of a file (uint8) -> class indices (uint8)."""
        return self._table[label]

    def to_file(self, index: np.ndarray) -> np.ndarray:
        """Class indices (no `IGNORE_INDEX` among them) -> numbers as in the annotation files, uint8."""
        return (index + self.first).astype(np.uint8)
