"""What a network did on every image of a test, kept beside its result so that networks are compared over the images."""

import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from evmamba.errors import UserError
from evmamba.files import replacing, write_errors

PER_IMAGE_FILE = "per_image.npz"
# A larger file is none of ours: all of COCO takes some ten megabytes.
MAX_BYTES = 4 * 2**30
IMAGES = "images"


class PerImage(ABC):
    """The images of a test, and what its metrics are made of, image by image.

    A file of it holds arrays alone (NumPy's ``.npz``, no pickles), and is refused unless names, kinds and shapes fit.

    Args:
        images: their names or ids, each once, sorted.
        arrays: as the subclass says.

    Raises:
        ValueError: the arrays do not fit each other.
    """

    # Kind of every array ("b" bool, "i" signed, "u" unsigned, "f" float).
    kinds: ClassVar[Mapping[str, str]]

    def __init__(self, images: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        self.images = list(images)
        self.arrays = dict(arrays)
        if self.images != sorted(set(self.images)):
            raise ValueError("images are not sorted, or one is there twice")
        for name, array in self.arrays.items():
            if self.kinds.get(self.plain(name)) != array.dtype.kind:
                raise ValueError(f"array {name} of type {array.dtype} is not expected")
        self.check()

    @staticmethod
    def plain(name: str) -> str:
        """Return the name in `kinds` of an array's name."""
        return name

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics that these predictions give."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError unless the arrays' shapes and values fit the images and each other."""

    @abstractmethod
    def metric(self, name: str, weights: np.ndarray) -> np.ndarray:
        """Return a metric of samples of the images.

        Args:
            name: one of `metrics`.
            weights: [S, number of images], how often every image is in a sample.

        Returns:
            [S], in [0, 1]; NaN where a sample does not define it.
        """

    def outcomes(self, name: str) -> np.ndarray | None:
        """Return whether each image was right, bool [images], where a metric is the mean of that; else None."""
        return None

    def write(self, path: Path) -> None:
        """Write the file, with the same bytes for the same predictions.

        Raises:
            UserError: it cannot be written.
        """
        names = np.array([name.encode() for name in self.images], dtype=np.bytes_)
        with write_errors(path), replacing(path) as partial:
            np.savez_compressed(partial, allow_pickle=False, **{IMAGES: names}, **self.arrays)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `write`; nothing in it is run.

        Raises:
            UserError: it cannot be read or is no such file; the message names it.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > MAX_BYTES:
                raise ValueError(f"it would take {size / 2**30:.0f} GB")
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            names = arrays.pop(IMAGES)
            if names.dtype.kind != "S" or names.ndim != 1:
                raise ValueError("its images have no names")
            return cls([name.decode() for name in names.tolist()], arrays)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        # RuntimeError: an encrypted member, or one packed in a way that zipfile does not know.
        except (
            ValueError,
            KeyError,
            MemoryError,
            EOFError,
            RuntimeError,
            zipfile.BadZipFile,
            zlib.error,
            struct.error,
        ) as error:
            raise UserError(
                f"{path}: no predictions per image of this evmamba ({error}); repeat its run, or remove the file"
            ) from error


def expect(holds: bool, what: str) -> None:
    """Raise ValueError, saying what does not hold."""
    if not holds:
        raise ValueError(what)
