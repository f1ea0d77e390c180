"""Images in tar shards (webdataset's convention), read at random through an index of their members.

A sample is an image and its label under one key: ``cat/001.jpg`` with ``cat/001.cls`` (a class number as text) or
``cat/001.json`` (an object with ``label``). Other members of the same key are ignored.

A tar file has no table of contents, but once its headers are read, a member is an offset and a size: one `pread`. So
shards behave like any list of images: the samplers that serve folders serve them, exactly, for any number of ranks and
workers and from any batch on. webdataset hands whole shards to ranks and cannot say at which sample it is; wids (its
indexed sister) takes a truncated shard for a shorter one; litdata reads its own format only.
"""

import hashlib
import itertools
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from filelock import FileLock
from PIL import Image
from torch import Tensor

from evmamba.errors import UserError, first_few, printable
from evmamba.files import replacing
from evmamba.tasks.cache import cache_folder
from evmamba.tasks.data import SPLITS, TEST
from evmamba.tasks.images import (
    BadImagePolicy,
    Jpeg,
    Region,
    find_faults,
    is_image_file,
    read_image,
    read_jpeg,
    read_pixels,
    read_region,
)
from evmamba.tasks.plain_files import is_file, read_json, read_text

INDEX_VERSION = 1
MAX_OPEN_FILES = 128  # per process: shells often allow 1024, which a data set may have in shards
# First and last bytes of complete files; what lies between is not looked at.
_COMPLETE = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))
_TAIL = 64
LONGEST_NAME = 4096  # as in a file system
LONGEST_LABEL = 2**20  # bytes of a .cls or .json
HIGHEST_LABEL = 2**31 - 1


class Member(NamedTuple):
    """One image in a shard: its name there, where its bytes lie, whether both ends are right, its class number."""

    name: str
    offset: int
    size: int
    complete: bool
    label: int


@dataclass(frozen=True)
class ShardImages:
    """The images of one split, sorted by class and name as the folders they came from.

    Attributes:
        folder: the split's name in front of every image's, as if the shards were unpacked; nothing lies there.
        files: the shards.
        names: [n] bytes, names in the shards, as a file system has them.
        shard: [n] int32, which file.
        offset: [n] int64, bytes.
        size: [n] int64, bytes.
        complete: [n] bool, whether the first and last bytes are those of a whole image; if not, only decoding tells.
        labels: [n] int32.
    """

    folder: Path
    files: tuple[Path, ...]
    names: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    complete: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def path(self, index: int) -> Path:
        """The image's file name, as if the shards were unpacked."""
        return self.folder / self.name(index)

    def size_of(self, index: int) -> int:
        """Bytes of the image file."""
        return int(self.size[index])

    def content(self, index: int) -> bytes:
        """The image file's bytes.

        Raises:
            UserError: the shard is gone or shorter than it was.
        """
        file, wanted = self.files[self.shard[index]], self.size_of(index)
        try:
            opened = _opened(file)
            found = os.pread(opened.number, wanted, int(self.offset[index]))
        except OSError as error:
            raise UserError(f"cannot read shard {file}: {error.strerror or error}") from None
        if len(found) != wanted:
            raise UserError(f"shard {file} has become shorter since its index was made; copy it again")
        return found

    def read(self, index: int) -> Image.Image:
        """The image as RGB, see :func:`evmamba.tasks.images.read_image`; errors name the shard as well."""
        return read_image(self._place(index), content=self.content(index))

    def read_pixels(self, index: int) -> Tensor:
        """The image as uint8 [3, H, W], see :func:`evmamba.tasks.images.read_pixels`."""
        return read_pixels(self._place(index), content=self.content(index))

    def read_region(self, index: int, choose: Callable[[int, int], Region]) -> Tensor:
        """A region of the image, see :func:`evmamba.tasks.images.read_region`."""
        return read_region(self._place(index), choose, content=self.content(index))

    def read_jpeg(self, index: int) -> Jpeg | None:
        """The image before it is decoded, see :func:`evmamba.tasks.images.read_jpeg`."""
        return read_jpeg(self._place(index), content=self.content(index))

    def _place(self, index: int) -> str:
        return f"{self.name(index)} in shard {self.files[self.shard[index]]}"

    def select(self, rows: Sequence[int]) -> Self:
        """Only these images."""
        kept = {key: getattr(self, key)[rows] for key in ("names", "shard", "offset", "size", "complete", "labels")}
        return replace(self, **kept)

    def with_files(self, files: Sequence[Path]) -> Self:
        """The same images in copies of the shards."""
        return replace(self, files=tuple(files))

    def find_unreadable(self, policy: BadImagePolicy) -> dict[Path, str]:
        """Why images cannot be read, by path; with "skip" all are decoded, with "stop" those in doubt."""

        def why(index: int) -> str | None:
            try:
                self.read(index)
            except UserError as error:
                return str(error)
            return None

        rows = range(len(self)) if policy == "skip" else np.flatnonzero(~self.complete).tolist()
        return {self.path(row): text for row, text in find_faults(rows, why).items()}


def list_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split: ``root/<split>/*.tar``, else ``root/*<split>*.tar`` ("validation" is "val").

    Raises:
        UserError: one of them is no file.
    """
    found = sorted((root / split).glob("*.tar")) or sorted(root.glob(f"*{split}*.tar"))
    for file in found:
        if not is_file(file):
            raise UserError(f"shard {file} is no file, or a link that leads nowhere")
    return found


def read_shards(root: Path, *, remember: bool = True) -> tuple[dict[str, ShardImages], list[str]]:
    """Index both splits and name the classes.

    Args:
        root: the data set.
        remember: keep the index in the cache folder and take it from there.

    Returns:
        {"train": ..., "val": ...}, with "test" where ``test/`` has labelled ones, and the class names: of
        ``classes.txt`` (one a line) or ``classes.json`` (a list),
        else the numbers.

    Raises:
        UserError: no shards for a split, a damaged shard, an image without label, a name that occurs twice, class
            numbers without a name, or classes that only one split has. Names the shard.
    """
    labelled = [TEST] if any(map(_has_labels, sorted((root / TEST).glob("*.tar"))[:1])) else []
    splits: dict[str, ShardImages] = {s: index_shards(root, s, remember) for s in (*SPLITS, *labelled)}
    names = read_class_names(root) or _numbered(root, splits)
    for split, images in splits.items():
        if images.labels.max() >= len(names):
            row = int(images.labels.argmax())
            raise UserError(
                f"{images.path(row).name} in shard {images.files[images.shard[row]]} has class {images.labels[row]}, "
                f"but {root} names {len(names)} classes, 0..{len(names) - 1}"
            )
        absent = sorted(set(range(len(names))) - set(np.unique(images.labels).tolist()))
        if absent:
            found = first_few(names[label] for label in absent)
            raise UserError(f"classes without images in the {split} shards of {root}: {found}")
    if len(names) < 2:
        raise UserError(f"only one class, {names[0]}, in the shards of {root}; at least two are needed")
    return splits, names


def _has_labels(file: Path) -> bool:
    """Whether a shard's first sample has one; a damaged one is for `index_shards` to name."""
    try:
        with tarfile.open(file, mode="r:") as archive:
            return any(member.name.endswith((".cls", ".json")) for member in itertools.islice(archive, 2))
    except (tarfile.TarError, OSError, EOFError):
        return True


def _numbered(root: Path, splits: Mapping[str, ShardImages]) -> list[str]:
    """The numbers as names, where no file has any."""
    used = np.unique(np.concatenate([images.labels for images in splits.values()]))
    if used[-1] >= len(used):
        absent = int(np.flatnonzero(used != np.arange(len(used)))[0])
        raise UserError(
            f"no image in the shards of {root} has class {absent}, but there is a class {used[-1]}; number the classes "
            "from 0 on, or name all of them in classes.txt"
        )
    return [str(label) for label in used]


def read_class_names(root: Path) -> list[str]:
    """Names from ``classes.txt`` or ``classes.json``, printable; empty if the folder has neither."""
    if os.path.lexists(file := root / "classes.txt"):
        names: Any = read_text(file).splitlines()
    elif os.path.lexists(file := root / "classes.json"):
        names = read_json(file)
    else:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names) or not names:
        raise UserError(f"{file} must hold one class name a line (as JSON: a list of names), k-th name for class k-1")
    return [printable(name) for name in names]


def index_shards(root: Path, split: str, remember: bool) -> ShardImages:
    """Read the headers of all members; with `remember` once, later starts take the index from the cache folder.

    Raises:
        UserError: see :func:`read_shards`.
    """
    files = list_shards(root, split)
    if not files:
        raise UserError(f"no {split} shards in {root}; expected {root / split}/*.tar or {root}/*{split}*.tar")
    arrays = _remembered_columns(files) if remember else _columns(files)
    return ShardImages(root / split, tuple(files), **arrays)


def _remembered_columns(files: list[Path]) -> dict[str, np.ndarray]:
    digest = hashlib.sha256(str(INDEX_VERSION).encode())
    for file in files:
        status = file.stat()
        digest.update(os.fsencode(f"{file.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    cached = cache_folder() / "shard_indexes" / f"{digest.hexdigest()[:24]}.npz"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_suffix(".lock")):  # of several processes one reads the headers, the others wait
            if not cached.is_file():
                with replacing(cached) as partial:
                    np.savez(partial, **_columns(files))  # type: ignore[arg-type]
        with np.load(cached) as archive:
            return dict(archive)
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile):
        return _columns(files)  # a cache that cannot be written or read costs a second look, nothing else


def _columns(files: list[Path]) -> dict[str, np.ndarray]:
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:  # header by header is waiting for disks
        found = [(number, member) for number, part in enumerate(pool.map(read_members, files)) for member in part]
    found.sort(key=lambda entry: (entry[1].label, entry[1].name))
    where: dict[str, int] = {}
    for number, member in found:
        if member.name in where:
            raise UserError(f"image {member.name} is in two shards, {files[where[member.name]]} and {files[number]}")
        where[member.name] = number
    return {
        "names": np.array([os.fsencode(member.name) for _, member in found]),
        "shard": np.array([number for number, _ in found], dtype=np.int32),
        "offset": np.array([member.offset for _, member in found], dtype=np.int64),
        "size": np.array([member.size for _, member in found], dtype=np.int64),
        "complete": np.array([member.complete for _, member in found], dtype=bool),
        "labels": np.array([member.label for _, member in found], dtype=np.int32),
    }


def read_members(file: Path) -> list[Member]:
    """The images of one shard with their labels, in its order.

    Raises:
        UserError: not an uncompressed tar file, truncated or damaged, an image without label, a label without image.
    """
    images: dict[str, tuple[str, int, int, bool]] = {}
    labels: dict[str, int] = {}
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            end = os.fstat(stream.fileno()).st_size
            for member in archive:
                if not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError(f"{member.name} is said to have {member.size} bytes")
                if not member.isfile():
                    continue
                if member.issparse() or len(member.name) > LONGEST_NAME:
                    raise UserError(f"shard {file}: {member.name[:80]} is sparse or has too long a name; pack it again")
                key, suffix = os.path.splitext(member.name)  # noqa: PTH122 (names in an archive)
                if is_image_file(Path(member.name)):
                    if key in images:
                        raise UserError(f"shard {file}: {images[key][0]} and {member.name} have the same key")
                    complete = _looks_complete(stream.fileno(), member.offset_data, member.size)
                    images[key] = (member.name, member.offset_data, member.size, complete)
                elif suffix == ".cls" or (suffix == ".json" and key not in labels):
                    stored = os.pread(stream.fileno(), min(member.size, LONGEST_LABEL), member.offset_data)
                    labels[key] = _label(stored, suffix, f"{member.name} in shard {file}")
            # tarfile takes a damaged header, and the lack of any, for the end; a whole archive ends with zeros.
            stream.seek(archive.offset)
            if stream.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end of archive at byte {archive.offset}")
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(f"shard {file} is truncated or damaged ({error}); copy it again") from None
    alone = [name for key, (name, *_) in images.items() if key not in labels] or sorted(labels.keys() - images.keys())
    if alone:
        lacking = "image" if alone[0] in labels else "label (.cls, or .json with a number as 'label')"
        raise UserError(f"shard {file} has no {lacking} for {first_few(alone, 1)}")
    if not images:
        raise UserError(f"shard {file} holds no images")
    return [Member(*place, labels[key]) for key, place in images.items()]


def _looks_complete(descriptor: int, offset: int, size: int) -> bool:
    head, tail = (
        os.pread(descriptor, 4, offset),
        os.pread(descriptor, min(size, _TAIL), offset + size - min(size, _TAIL)),
    )
    return any(head.startswith(first) and last in tail for first, last in _COMPLETE)


def _label(content: bytes, suffix: str, where: str) -> int:
    try:
        label = int(content) if suffix == ".cls" else msgspec.json.decode(content)["label"]
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.DecodeError):
        label = None
    if type(label) is not int or not 0 <= label <= HIGHEST_LABEL:
        raise UserError(f"{where} holds no class number: {content[:40]!r}")
    return label


class _Descriptor:
    """An open file that closes when nobody holds it any more: a thread may read what another one has just dropped."""

    def __init__(self, file: Path) -> None:
        self.number = -1
        self.number = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


# `pread` has no position, so threads and forked processes may share a descriptor.
_opened = lru_cache(maxsize=MAX_OPEN_FILES)(_Descriptor)
