"""From class folders to tar shards."""

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evmamba.errors import UserError
from evmamba.files import new_folder
from evmamba.tasks.classification.folders import FolderImages, read_folders
from evmamba.tasks.classification.shards import ShardImages, read_shards

# Padding, two headers and a label come to this much a sample, in bytes.
OVERHEAD = 2048


def write_shards(
    root: Path,
    output: Path,
    shard_bytes: int,
    jobs: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Path]]:
    """Write ``train/*.tar``, ``val/*.tar`` and ``classes.txt`` from ``train/<class>/*`` and ``val/<class>/*``.

    Images are copied byte for byte. Each split is shuffled (always alike), so that programs which read shards from
    front to back meet mixed classes. The folder gets its name when everything is written and read back.

    Args:
        root: the folders.
        output: does not exist yet.
        shard_bytes: about the size of a shard.
        jobs: shards written at once.
        advance: called with the number of images written since the last call, and of all.

    Returns:
        The shards of each split.

    Raises:
        UserError: what `list_dataset` finds wrong, an output that exists or has no room, two images of a class that
            differ in the suffix only, or shards that do not hold what the folders do.
    """
    if output.exists():
        raise UserError(f"{output} exists already; name a new folder")
    splits, classes = read_folders(root)
    total = sum(map(len, splits.values()))
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(_bytes(images) for images in splits.values()), shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(f"the shards need {needed / 1e9:.1f} GB, but {output.parent} has {free / 1e9:.1f} GB free")
    for split, images in splits.items():
        _check_keys(images, split)
    with new_folder(output) as partial:
        (partial / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        for split, images in splits.items():
            (partial / split).mkdir()
            parts = list(_parts(images, shard_bytes))
            files = [partial / split / f"{split}-{number:06d}.tar" for number in range(len(parts))]
            with ThreadPoolExecutor(jobs) as pool:
                for count in pool.map(_write, files, parts, [images] * len(parts)):
                    advance(count, total)
        written, names = read_shards(partial, remember=False)
        for split, images in splits.items():
            _verify(images, written[split], names == classes)
    return {split: sorted((output / split).iterdir()) for split in splits}


def _bytes(images: FolderImages) -> int:
    return sum(images.size_of(k) + OVERHEAD for k in range(len(images)))


def _parts(images: FolderImages, shard_bytes: int) -> Iterator[list[int]]:
    """Rows for each shard."""
    part: list[int] = []
    size = 0
    for row in np.random.default_rng(0).permutation(len(images)).tolist():
        part.append(row)
        size += images.size_of(row) + OVERHEAD
        if size >= shard_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write(file: Path, rows: list[int], images: FolderImages) -> int:
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for row in rows:
            name = images.name(row)
            _add(archive, name, images.path(row).read_bytes())
            _add(archive, f"{name.rpartition('.')[0]}.cls", str(images.labels[row]).encode())
    return len(rows)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same folders give the same shards
    member.size = len(content)
    member.mode = 0o644
    archive.addfile(member, io.BytesIO(content))


def _check_keys(images: FolderImages, split: str) -> None:
    seen: dict[str, str] = {}
    for row in range(len(images)):
        name = images.name(row)
        key = name.rpartition(".")[0]
        if key in seen:
            raise UserError(f"{split}/{seen[key]} and {split}/{name} differ in the suffix only; rename one of them")
        seen[key] = name


def _verify(images: FolderImages, written: ShardImages, same_classes: bool) -> None:
    """Names, classes and sizes are those of the folders."""
    sizes = np.array([images.size_of(row) for row in range(len(images))])
    same = len(images) == len(written) and np.array_equal(images.names, written.names)
    if not (
        same_classes and same and np.array_equal(images.labels, written.labels) and np.array_equal(sizes, written.size)
    ):
        raise UserError(f"the shards do not hold what {images.folder} holds; did somebody change it meanwhile?")
