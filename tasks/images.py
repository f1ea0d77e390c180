"""Reading image files right, and finding the unreadable ones before training starts."""

import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from evmamba.errors import UserError, first_few, first_line
from evmamba.tasks.jpeg_regions import LEAST_PIXELS, Frame, can_decode, decode_region, find_frame

# Top, left, height and width of a part of an image, in pixels.
Region = tuple[int, int, int, int]
Item = TypeVar("Item")
BadImagePolicy = Literal["stop", "skip"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})

ITEMS_A_TASK = 64

# What Pillow may take a file for. It knows more kinds, and draws some of them by starting another program (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# EXIF's orientation of an image that is stored as it is seen, and those that swap width and height.
UPRIGHT = 1
TURNED = (5, 6, 7, 8)

# What a page shows behind a transparent picture.
BACKGROUND = (255, 255, 255)

# A file with the right end is complete; without it the decoder decides (some cameras append bytes of their own).
_COMPLETE_TAIL = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def is_image_file(path: Path) -> bool:
    """Whether the name is that of an image: a known suffix in any case, not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def read_image(path: str | os.PathLike, *, upright: bool = True, content: bytes | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, the way a person would see it.

    The format is told by the content, not by the name. EXIF orientation is applied; palettes are expanded; transparency
    is composited over white; 16-bit grayscale is scaled to 8 bits (not clipped); CMYK follows Adobe's inverted
    convention as Pillow does; of several frames the first is taken.

    Args:
        path: the file.
        upright: False leaves the pixels as they are stored, for labels that were drawn on those.
        content: the file's bytes, where they come from elsewhere (a tar shard) and `path` only names them.

    Returns:
        PIL image of mode RGB, fully decoded.

    Raises:
        UserError: missing, truncated, not an image, or of a kind without a defined 8-bit range; names the file.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            return _to_rgb(_upright(image) if upright else image)
    except FileNotFoundError:
        raise UserError(f"image not found: {path}") from None
    except UnidentifiedImageError as error:  # whose text is the repr of what was opened
        raise UserError(f"cannot read image {path}: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    except (
        Exception
    ) as error:  # decoders raise nearly anything on damaged files: OSError, SyntaxError, struct.error, ...
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot read image {path}: {reason.replace(str(path), 'the file')}") from error


def read_pixels(
    path: str | os.PathLike, *, upright: bool = True, content: bytes | None = None, exact: bool = False
) -> Tensor:
    """Read an image as :func:`read_image` does, into a tensor: JPEGs with torchvision's decoder, a fifth faster.

    Args:
        path, upright, content: as there.
        exact: leave it to Pillow always, as evaluation does: the same pixels wherever it runs.

    Returns:
        uint8 [3, H, W], the three colours of a pixel side by side in memory. Grey and colour JPEGs are the same pixels
        as Pillow's where the two libraries hold the same libjpeg-turbo; everything else is read by Pillow.

    Raises:
        UserError: as there.
    """
    jpeg = None if exact else read_jpeg(path, content=content)
    pixels = None if jpeg is None else _decoded(jpeg, upright)
    if pixels is not None:
        return pixels
    image = read_image(path, upright=upright, content=content)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_region(
    path: str | os.PathLike, choose: Callable[[int, int], Region], *, content: bytes | None = None
) -> Tensor:
    """Read a region of an image, the same pixels as :func:`read_pixels` has there, and decode no more than it takes.

    Of a JPEG's header no more is looked at than that takes: where something else in it is broken, Pillow may refuse a
    file of which a region is read.

    Args:
        path, content: as of :func:`read_image`.
        choose: given height and width of the upright image, says which region.

    Returns:
        uint8 [3, height, width] of the region, the three colours of a pixel side by side in memory.

    Raises:
        UserError: as of :func:`read_image`.
    """
    stored = _stored(path) if content is None else content
    frame = _frame_to_decode(path, stored) if stored and can_decode() else None
    if stored is None or frame is None:
        whole = read_pixels(path, content=stored)
        return cut(whole, choose(*whole.shape[1:]))
    region = choose(frame.height, frame.width)
    decoded = decode_region(stored, *region)
    return cut(read_pixels(path, content=stored), region) if decoded is None else decoded


def _stored(path: str | os.PathLike) -> bytes | None:
    """A file's bytes; None where it cannot be read, about which `read_image` has something to say."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError):
        return None


def _frame_to_decode(path: str | os.PathLike, content: bytes) -> Frame | None:
    """The frame of an upright JPEG whose regions are sooner decoded than the whole."""
    frame = find_frame(content)
    if frame is None or frame.height * frame.width < LEAST_PIXELS:
        return None
    limit = Image.MAX_IMAGE_PIXELS
    if frame.described or (limit is not None and frame.height * frame.width > limit):  # Pillow has to say
        jpeg = read_jpeg(path, content=content)
        return frame if jpeg is not None and jpeg.orientation == UPRIGHT else None
    return frame


def cut(pixels: Tensor, region: Region) -> Tensor:
    """A region of [..., H, W], not copied."""
    top, left, height, width = region
    return pixels[..., top : top + height, left : left + width]


def _decoded(jpeg: "Jpeg", upright: bool = True) -> Tensor | None:
    """None: one about which `read_image` has something to say.

    It is turned as Pillow reads the orientation: torchvision reads EXIF's with a parser of its own, and no XMP.
    """
    (pixels,) = decode_jpegs([jpeg.content], torch.device("cpu"))
    return turn_upright(pixels, jpeg.orientation) if upright and pixels is not None else pixels


class Jpeg(NamedTuple):
    """A grey or colour JPEG that is not decoded yet: its bytes, uint8 [n], and what its header says.

    `height` and `width` are those of the upright image, `orientation` is EXIF's or XMP's (1: upright as it is stored).
    """

    content: Tensor
    height: int
    width: int
    orientation: int


def read_jpeg(path: str | os.PathLike, *, content: bytes | None = None) -> Jpeg | None:
    """Read a file without decoding it; None where it is no grey or colour JPEG, or cannot be read.

    Args:
        path, content: as of :func:`read_image`.
    """
    try:
        content = Path(path).read_bytes() if content is None else content
        # Pillow knows which sizes no photograph has.
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.mode not in ("L", "RGB"):
                return None
            width, height = image.size
            orientation = _orientation(image)
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    if orientation in TURNED:
        width, height = height, width
    return Jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), height, width, orientation)


def decode_jpegs(contents: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs as they are stored, on a CPU or by CUDA's decoder: uint8 [3, H, W] on `device`.

    Args:
        contents: what :func:`read_jpeg` gives.
        device: for CUDA see :func:`check_decoder`.

    Returns:
        None for one that the decoder refuses.
    """
    if not contents:
        return []
    try:
        return list(decode_jpeg(list(contents), mode=ImageReadMode.RGB, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of a list it does not say which
        if len(contents) == 1:
            return [None]
        return [image for content in contents for image in decode_jpegs([content], device)]


def check_decoder(device: torch.device, option: str) -> None:
    """See that JPEGs can be decoded on a device, as `option` asks.

    Raises:
        UserError: they cannot, and why.
    """
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"{option}: torchvision decodes JPEGs on a CPU and with CUDA, not on {device.type}; leave it out"
        )
    sample = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
    try:
        decode_jpeg([sample], device=device)
    except RuntimeError as error:
        raise UserError(
            f"{option}: this torchvision cannot decode JPEGs on {device.type} ({first_line(error)}); leave it out"
        ) from error


def turn_upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turn [..., H, W] as EXIF says."""
    if orientation in TURNED:
        pixels = pixels.transpose(-2, -1)
    mirrored = {-1: orientation in (2, 3, 6, 7), -2: orientation in (3, 4, 7, 8)}
    axes = [axis for axis, turned in mirrored.items() if turned]
    return pixels.flip(axes) if axes else pixels


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF orientation swaps the width and height of an image that is open."""
    return _orientation(image) in TURNED


def _orientation(image: Image.Image) -> int:
    """As EXIF data or XMP say it; damaged ones say nothing, which is 1."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # decoders raise nearly anything on damaged files
        return UPRIGHT
    return int(value) if value in range(1, 9) else UPRIGHT


def _upright(image: Image.Image) -> Image.Image:
    """Apply EXIF orientation; a damaged EXIF block does not make the picture unreadable."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the caller closes the file
    if image.mode.startswith("I"):  # I;16, I;16B, I: sixteen-bit grayscale
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{image.mode} pixels from {values.min()} to {values.max()} have no 8-bit meaning; convert it"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError("floating-point pixels have no 8-bit meaning; convert it to 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), layer).convert("RGB")
    return image.convert("RGB")


def why_unreadable(path: Path, decode: bool) -> str | None:
    """Return why the image cannot be read, or None if it can.

    Args:
        path: the file.
        decode: True decodes every pixel. False reads the header and the file's end (fast enough for ImageNet) and
            decodes only where these leave a doubt.
    """
    if not decode and _looks_complete(path):
        return None
    try:
        read_image(path)
    except UserError as error:
        return str(error)
    return None


def _looks_complete(path: Path) -> bool:
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:  # parses the header only
            tail = _COMPLETE_TAIL.get(image.format or "")
            if tail is None:
                return False
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 64))
            return tail in file.read()
    except Exception:
        return False


def find_unreadable(paths: Sequence[Path], policy: BadImagePolicy) -> dict[Path, str]:
    """Check the files in parallel; with "skip" by decoding them all, with "stop" by header and end.

    Returns:
        For every unreadable file why, in the order given.
    """
    return find_faults(paths, lambda path: why_unreadable(path, decode=policy == "skip"))


def find_faults(items: Sequence[Item], why: Callable[[Item], str | None]) -> dict[Item, str]:
    """Ask `why` about every item, in threads; return its answers other than None, in the order given."""

    def ask(part: Sequence[Item]) -> list[tuple[Item, str]]:
        answers = ((item, why(item)) for item in part)
        return [(item, answer) for item, answer in answers if answer is not None]

    # In parts: a million tasks of their own would take gigabytes before the first begins.
    parts = [items[k : k + ITEMS_A_TASK] for k in range(0, len(items), ITEMS_A_TASK)]
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return dict(fault for faults in pool.map(ask, parts) for fault in faults)


def handle_unreadable(bad: dict[Path, str], total: int, policy: BadImagePolicy, where: str) -> None:
    """Stop, or warn that the files are left out, as the policy says. Nothing happens without bad files.

    Args:
        bad: from :func:`find_unreadable`.
        total: how many files were checked.
        policy: "stop" or "skip".
        where: which part of the data, e.g. "train"; for the message.

    Raises:
        UserError: policy "stop", or no readable image is left.
    """
    if not bad:
        return
    named = first_few(bad.values(), 3, "; ")
    count = f"{len(bad)} of {total} {where} images cannot be read"
    if policy == "stop":
        raise UserError(f"{count}: {named}; mend or remove them, or leave them out with data.on_bad_image=skip")
    if len(bad) == total:
        raise UserError(f"{count}, so nothing is left: {named}")
    warnings.warn(f"{count} and are left out: {named}", stacklevel=2)


def size_within(size: tuple[int, int], short: float, long: float = math.inf) -> tuple[int, int]:
    """The largest size of these proportions, whose sides are at most `short` and `long`, rounded half up.

    Args:
        size: height and width in pixels.
        short: limit of the short side.
        long: limit of the long side.

    Returns:
        Height and width, at least a pixel each.
    """
    factor = min(short / min(size), long / max(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width
