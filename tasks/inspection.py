"""A full look at image files, in parallel: whether they can be decoded, their sizes, and a hash of their content."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.images import FORMATS, is_turned, read_image

Item = TypeVar("Item")
Found = TypeVar("Found")
ITEMS_AT_ONCE = 16


class Place(NamedTuple):
    """Where an image's bytes are: a file, or a part of one.

    Attributes:
        name: how to call it in messages.
        file: the file.
        offset: first byte.
        size: bytes; None up to the end.
    """

    name: str
    file: Path
    offset: int = 0
    size: int | None = None


class Look(NamedTuple):
    """What an image file is.

    Attributes:
        error: why it cannot be used, or None.
        width: pixels as stored; 0 if unreadable.
        height: pixels as stored.
        turned: whether EXIF orientation swaps width and height.
        size: bytes.
        digest: of the bytes.
    """

    error: str | None
    width: int
    height: int
    turned: bool
    size: int
    digest: bytes

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height that labels may have been drawn on: as stored, and upright."""
        stored = (self.width, self.height)
        return (stored, stored[::-1]) if self.turned else (stored,)


def look_at(place: Place) -> Look:
    """Read and decode one image."""
    try:
        with place.file.open("rb") as file:
            file.seek(place.offset)
            content = file.read(-1 if place.size is None else place.size)
    except OSError as error:
        return Look(f"cannot read image {place.name}: {error.strerror or error}", 0, 0, False, 0, b"")
    digest = hashlib.blake2b(content, digest_size=16).digest()
    width = height = 0
    turned = False
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            turned = is_turned(image)
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                # Every coefficient is read, but few pixels are computed: two to three times faster.
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
                image.load()
                return Look(None, width, height, turned, len(content), digest)
    except Exception:
        pass  # what is wrong, if anything, is said below, in the words of training
    try:
        read_image(place.name, content=content)
    except UserError as error:
        return Look(str(error), 0, 0, False, len(content), digest)
    return Look(None, width, height, turned, len(content), digest)


@contextmanager
def workers(jobs: int) -> Iterator[Executor | None]:
    """Processes to look with, or None where one is enough. Start them before anything that starts threads."""
    if jobs == 1:
        yield None
        return
    with ProcessPoolExecutor(jobs) as pool:
        ready: list[Future] = [pool.submit(os.getpid) for _ in range(jobs)]
        for future in ready:
            future.result()
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def look_at_all(
    pool: Executor | None, look: Callable[[Item], Found], items: Sequence[Item], advance: Callable[[int], None]
) -> list[Found]:
    """Apply `look` to all items, in their order; `advance` is called with the number of items done."""
    found = []
    results = map(look, items) if pool is None else pool.map(look, items, chunksize=ITEMS_AT_ONCE)
    for result in results:
        found.append(result)
        advance(1)
    return found
