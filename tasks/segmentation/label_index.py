"""One look at every label file before training starts: sizes, and which labels occur. Remembered between starts."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.console import Console
from rich.progress import track

from evmamba.errors import UserError, first_few
from evmamba.files import replacing
from evmamba.tasks.cache import cache_folder
from evmamba.tasks.images import FORMATS, is_turned
from evmamba.tasks.segmentation.labels import LabelMap, read_label

INDEX_VERSION = 1


class Pair(NamedTuple):
    """An image and its label file."""

    image: Path
    label: Path


@dataclass
class LabelIndex:
    """What a set of label files holds.

    Attributes:
        unreadable: label file -> why it cannot be read.
        mismatched: label file -> how its size differs from its image's.
        first_file: label number -> first file that holds it, over the readable files.
    """

    unreadable: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, str] = field(default_factory=dict)
    first_file: dict[int, str] = field(default_factory=dict)

    def check(self, label_map: LabelMap, num_files: int) -> None:
        """Stop if labels do not fit their images or the classes.

        Raises:
            UserError: masks of another size, labels out of range, or no labelled pixel at all.
        """
        if self.mismatched:
            found = first_few(self.mismatched.values(), 1, "; ")
            raise UserError(f"{found}; a label must have its image's size")
        wrong = sorted(value for value in self.first_file if not label_map.is_valid(value))
        if wrong:
            ignored = ", ".join(map(str, sorted(label_map.ignored))) or "no label"
            raise UserError(
                f"label {first_few(wrong)} in {self.first_file[wrong[0]]} is out of range: {label_map.num_classes} "
                f"classes are labels {label_map.range}, {ignored} is ignored; mend the file or see data.ignore_label"
            )
        if num_files and not any(label_map.is_class(value) for value in self.first_file):
            raise UserError(f"not one pixel of the {num_files} label files has a class ({label_map.range})")


def index_labels(pairs: Sequence[Pair]) -> LabelIndex:
    """Read all label files, in parallel, or take what an earlier look at the same files (names, sizes, times) found."""
    if not pairs:
        return LabelIndex()
    cached = _cache_file(pairs)
    try:
        return _from_json(cached.read_text())
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no index of these files yet, or one that another version wrote
    index = _read(pairs)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as partial:
            partial.write_text(json.dumps(asdict(index)))
    except OSError:
        pass  # a cache that cannot be written costs the next start a second look, nothing else
    return index


def _read(pairs: Sequence[Pair]) -> LabelIndex:
    index = LabelIndex()
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        findings = track(
            pool.map(look_at_pair, pairs),
            description="checking labels",
            total=len(pairs),
            transient=True,
            console=Console(file=sys.stderr),
            disable=len(pairs) < 1000,  # a second or two
        )
        for (_, label), (problem, kind, values) in zip(pairs, findings, strict=True):
            if kind == "unreadable":
                index.unreadable[str(label)] = problem
            elif kind == "mismatched":
                index.mismatched[str(label)] = problem
            for value in values:
                index.first_file.setdefault(value, str(label))
    return index


def look_at_pair(pair: Pair) -> tuple[str, str, list[int]]:
    """Problem, its kind ("unreadable", "mismatched" or "") and the label numbers of one pair."""
    try:
        label = read_label(pair.label)
    except UserError as error:
        return str(error), "unreadable", []
    height, width = label.shape
    sizes = image_sizes(pair.image)
    if sizes and (width, height) not in sizes:
        image_width, image_height = sizes[0]
        return f"label {pair.label} is {width}x{height} but its image is {image_width}x{image_height}", "mismatched", []
    # Pillow's histogram is several times faster than numpy's unique or bincount.
    return "", "", [value for value, count in enumerate(Image.fromarray(label).histogram()) if count]


def image_sizes(path: Path) -> list[tuple[int, int]]:
    """Width and height as seen, and as stored where EXIF orientation swaps them; nothing if the header is damaged."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            turned = is_turned(image)
    except Exception:
        return []  # reported where all images are looked at
    return [(height, width), (width, height)] if turned else [(width, height)]


def _from_json(text: str) -> LabelIndex:
    fields = json.loads(text)
    fields["first_file"] = {int(value): name for value, name in fields["first_file"].items()}
    return LabelIndex(**fields)


def _cache_file(pairs: Sequence[Pair]) -> Path:
    digest = hashlib.sha256(str(INDEX_VERSION).encode())
    for pair in pairs:
        for path in pair:
            status = path.stat()
            digest.update(os.fsencode(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    return cache_folder() / "label_indexes" / f"{digest.hexdigest()[:24]}.json"
