"""The look at every label file before a training: what it finds, and that it is remembered."""

from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from evmamba.errors import UserError
from evmamba.tasks.segmentation import label_index
from evmamba.tasks.segmentation.label_index import Pair, index_labels
from evmamba.tasks.segmentation.labels import LabelMap


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "cache"))
    found = []
    for k, values in enumerate(([0, 1], [1, 2], [7, 255])):
        pair = Pair(tmp_path / f"{k}.jpg", tmp_path / f"{k}.png")
        Image.new("RGB", (6, 4)).save(pair.image)
        Image.fromarray(np.resize(np.array(values, dtype=np.uint8), (4, 6))).save(pair.label)
        found.append(pair)
    return found


def test_every_label_is_found_with_the_first_file_that_holds_it(pairs: list[Pair]):
    index = index_labels(pairs)
    assert index.first_file == {value: str(pairs[k].label) for value, k in ((0, 0), (1, 0), (2, 1), (7, 2), (255, 2))}
    assert index.unreadable == index.mismatched == {}


def test_files_are_read_once_and_again_when_one_changes(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch):
    looked: list[Path] = []
    look = label_index.look_at_pair
    monkeypatch.setattr(label_index, "look_at_pair", lambda pair: looked.append(pair.label) or look(pair))
    first = index_labels(pairs)
    assert index_labels(pairs) == first
    assert len(looked) == len(pairs)
    Image.new("L", (6, 4), 3).save(pairs[0].label)
    assert 3 in index_labels(pairs).first_file
    assert len(looked) == 2 * len(pairs)


def test_a_label_of_another_size_stops_and_one_of_a_turned_photo_does_not(pairs: list[Pair]):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (4, 6)).save(pairs[0].image, exif=exif)  # 6 x 4 as it is seen
    assert index_labels(pairs).mismatched == {}
    Image.new("RGB", (5, 4)).save(pairs[1].image)
    Image.new("RGB", (5, 5)).save(pairs[2].image)
    with pytest.raises(UserError, match=r"1\.png is 6x4 but its image is 5x4; and 1 more; a label must have"):
        index_labels(pairs).check(LabelMap(8, False, 255), len(pairs))


def test_labels_out_of_range_are_named_with_a_file(pairs: list[Pair]):
    index_labels(pairs).check(LabelMap(8, False, 255), len(pairs))
    with pytest.raises(UserError, match=r"label 2, 7 in .*1\.png is out of range: 2 classes"):
        index_labels(pairs).check(LabelMap(2, False, 255), len(pairs))
