"""One look at an image: what it is, or why it cannot be used, in the words of training."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.images import read_image
from evmamba.tasks.inspection import Place, look_at, look_at_all, workers

ORIENTATION = 0x0112


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A JPEG, 60 x 40 as stored, that EXIF turns by a quarter."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_a_turned_photo_has_two_sizes_that_labels_may_be_drawn_on(photo: Path):
    look = look_at(Place("photo", photo))
    assert (look.error, look.width, look.height, look.turned) == (None, 60, 40, True)
    assert look.sizes == ((60, 40), (40, 60))
    assert look.size == photo.stat().st_size


def test_a_part_of_a_file_is_looked_at_alone(photo: Path, tmp_path: Path):
    content = photo.read_bytes()
    (tmp_path / "shard").write_bytes(b"before" + content + b"after")
    look = look_at(Place("member", tmp_path / "shard", 6, len(content)))
    assert look == look_at(Place("photo", photo))  # the same digest too


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", None], ids=["empty", "text", "truncated"])
def test_what_training_could_not_read_has_its_words(photo: Path, content: bytes | None):
    whole = photo.read_bytes()
    photo.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError) as told:
        read_image(photo)
    assert look_at(Place(str(photo), photo)).error == str(told.value)


def test_a_file_that_is_gone_is_named(tmp_path: Path):
    assert look_at(Place("gone.jpg", tmp_path / "gone.jpg")).error == (
        "cannot read image gone.jpg: No such file or directory"
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_items_keep_their_order_and_each_is_counted(jobs: int):
    done: list[int] = []
    with workers(jobs) as pool:
        assert look_at_all(pool, abs, [-3, 1, -2], done.append) == [3, 1, 2]
        assert (pool is None) == (jobs == 1)
        if pool is not None:
            assert pool.submit(os.getpid).result() != os.getpid()
    assert done == [1, 1, 1]
