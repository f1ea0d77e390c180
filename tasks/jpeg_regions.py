"""A region of a JPEG without the rest, by nvImageCodec on a CPU: libjpeg-turbo's partial decoding.

Of what lies above the region only the codes are read, of what lies below it nothing. The pixels are those of the whole
image, to the bit.
"""

import importlib
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

# Pixels of an image below which nothing is gained; columns of a region, of which few are interpolated in another way.
LEAST_PIXELS, LEAST_WIDTH = 2**17, 16
# Of a JPEG (ITU-T T.81, table B.1), its start and the bytes after 0xFF that may follow: Huffman's sequential frames (of
# progressive ones the pixels at a region's edge may be others), tables, restarts, a comment, what programs add, of
# which EXIF and XMP are one, and a scan; then the end.
START_OF_IMAGE = b"\xff\xd8"
FRAMES = frozenset({0xC0, 0xC1})
DESCRIPTION, START_OF_SCAN, END_OF_IMAGE = 0xE1, 0xDA, 0xD9
SEGMENTS = FRAMES | {0xC4, 0xDB, 0xDD, 0xFE, START_OF_SCAN} | frozenset(range(0xE0, 0xF0))
# A marker within or behind a scan: not a byte of the codes that is 0xFF, not filling, no restart.
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# Of the shortest segment, with its marker, that is a scan's of one colour.
LEAST_SEGMENT = 10

# The file's bytes, top, left, height and width -> the region's pixels.
Decode = Callable[[np.ndarray, int, int, int, int], Tensor | None]

_own = threading.local()  # a decoder is one thread's
_loading = threading.Lock()


class Frame(NamedTuple):
    """Height and width in pixels as stored; whether EXIF or XMP may say that it is to be turned."""

    height: int
    width: int
    described: bool


def find_frame(content: bytes) -> Frame | None:
    """The frame of a grey or colour JPEG whose pixels are in one sequential scan, which goes on to the image's end.

    A decoder that stops below a region does not see that a file is damaged or cut off there, and takes a marker that
    has no place in a scan for its end: grey follows. Of several scans all are needed: nothing is saved.

    Args:
        content: the file's bytes.

    Returns:
        None for every other file.
    """
    if not content.startswith(START_OF_IMAGE):
        return None
    place, kind, described = len(START_OF_IMAGE), 0, False
    size: tuple[int, int] | None = None
    while kind != START_OF_SCAN:
        if place + LEAST_SEGMENT > len(content):
            return None
        mark, kind, length = struct.unpack_from(">BBH", content, place)
        if mark != 0xFF or kind not in SEGMENTS or length < 2 or (kind in FRAMES and size is not None):
            return None
        if kind in FRAMES:
            bits, height, width, colours = struct.unpack_from(">BHHB", content, place + 4)
            if bits != 8 or height == 0 or width == 0 or colours not in (1, 3):
                return None
            size = height, width
        described |= kind == DESCRIPTION
        place += 2 + length
    end = MARKER.search(content, place)
    if size is None or end is None or end[0][1] != END_OF_IMAGE:
        return None
    return Frame(*size, described)


def can_decode() -> bool:
    """Whether nvImageCodec is installed and works; it is tried the first time."""
    return _decoder() is not None


def decode_region(content: bytes, top: int, left: int, height: int, width: int) -> Tensor | None:
    """Decode a region of a JPEG as it is stored.

    Args:
        content: the file's bytes, in which :func:`find_frame` found one.
        top, left, height, width: the region in pixels, within the image.

    Returns:
        uint8 [3, height, width], the colours of a pixel side by side in memory; None where nvImageCodec is not
        installed, and for what it refuses.
    """
    decode = _decoder()
    if decode is None or width < LEAST_WIDTH:
        return None
    try:
        return decode(np.frombuffer(content, np.uint8), top, left, height, width)
    except RuntimeError:  # the whole image's decoder will say what is wrong
        return None


def _decoder() -> Decode | None:
    """This thread's, made and tried the first time."""
    if not hasattr(_own, "decode"):
        _own.decode = _start()
    return _own.decode


def _start() -> Decode | None:
    """A decoder of nvImageCodec's; None where that is not installed, or is another thing than it was."""
    try:
        with _loading, _silent():
            codec = importlib.import_module("nvidia.nvimgcodec")
        decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,  # the calling one: threads of a pool would be missing in a forked process
            backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        )
        # Turning it upright is the caller's, as Pillow reads the orientation.
        as_stored = codec.DecodeParams(apply_exif_orientation=False)

        def decode(stored: np.ndarray, top: int, left: int, height: int, width: int) -> Tensor | None:
            region = codec.Region(top, left, top + height, left + width)
            image = decoder.decode(codec.CodeStream(stored).get_sub_code_stream(region=region), params=as_stored)
            return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

        sample = encode_jpeg(torch.arange(3 * 64 * 64).view(3, 64, 64).byte(), quality=90)
        found = decode(sample.numpy(), 9, 11, 40, 30)
        if found is None or not torch.equal(found, decode_jpeg(sample)[:, 9:49, 11:41]):
            raise RuntimeError("it decodes other pixels than libjpeg-turbo")
    except Exception as error:  # of a library that does not fit: RuntimeError, AttributeError, TypeError, ...
        if not (isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.nvimgcodec")):
            warnings.warn(f"nvImageCodec does not work here, so whole images are decoded: {error}", stacklevel=2)
        return None
    return decode


@contextmanager
def _silent() -> Iterator[None]:
    """Send what the library's parts print on loading, that there is no GPU's decoder, nowhere."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # we say which file was refused
    try:
        kept = os.dup(2)
    except OSError:  # closed: nothing is to be kept silent
        yield
        return
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
