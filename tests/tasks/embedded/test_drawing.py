"""The drawn data sets: the same bytes every time, valid layouts, and made safely by several processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from evmamba.tasks.embedded import (
    write_classification,
    write_detection,
    write_segmentation,
)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [write_classification, write_detection, write_segmentation])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(write: Callable, tmp_path: Path) -> None:
    for name, train, seed in (("a", 12, 0), ("b", 12, 0), ("more", 14, 0), ("other", 12, 1)):
        write(tmp_path / name, train=train, val=10, size=64, seed=seed)
    first, again, more, other = (_files(tmp_path / name) for name in ("a", "b", "more", "other"))
    assert first == again
    pictures = [name for name in first if name.endswith(".jpg")]
    assert len(pictures) == 22
    assert all(more[name] == first[name] for name in pictures)  # a longer set begins with the shorter one
    assert all(other.get(name) != first[name] for name in pictures)
    assert len({first[name] for name in pictures}) == len(pictures)
