"""The folder layout, and one clear line for each way to get it wrong."""

from pathlib import Path

import pytest
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.classification.folders import list_dataset


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            Image.new("RGB", (8, 8)).save(path, format="PNG")
        else:
            path.mkdir()
    return root


GOOD = ("train/b/1.jpg", "train/a/2.PNG", "train/a/1.webp", "val/a/3.bmp", "val/b/4.TIFF")


def test_classes_and_files_are_sorted_and_the_rest_is_ignored(tmp_path: Path):
    make(tmp_path, *GOOD, "train/a/deeper/5.jpg", "train/a/.hidden.jpg", "train/.cache/6.jpg", "val/b/._4.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "readme.md").write_text("not a class")
    train, val = list_dataset(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in train.items()} == {
        "a": ["1.webp", "2.PNG"],
        "b": ["1.jpg"],
    }
    assert list(train) == ["a", "b"]
    assert {name: [path.name for path in paths] for name, paths in val.items()} == {"a": ["3.bmp"], "b": ["4.TIFF"]}


def test_classes_that_differ_are_named(tmp_path: Path):
    make(tmp_path, *GOOD, "train/c/1.jpg", "val/d/1.jpg", "val/e/1.jpg")
    with pytest.raises(UserError, match=r"differ in .*: only in train: c; only in val: d, e$"):
        list_dataset(tmp_path)


def test_empty_class_folder_is_named(tmp_path: Path):
    make(tmp_path, *GOOD, "train/c", "val/c/1.jpg")
    with pytest.raises(UserError, match=r"class folders without images in .*train: c$"):
        list_dataset(tmp_path)


def test_images_below_a_class_folder_get_a_hint(tmp_path: Path):
    make(tmp_path, *GOOD, "train/c/more/1.jpg", "val/c/1.jpg")
    with pytest.raises(UserError, match=r"train: c; images in folders below a class folder do not count"):
        list_dataset(tmp_path)


def test_images_without_class_folders(tmp_path: Path):
    make(tmp_path, "train/1.jpg", "train/2.jpg", "val/a/1.jpg")
    with pytest.raises(UserError, match=r"no class folders in .*train \(2 images lie directly in it\)"):
        list_dataset(tmp_path)


def test_empty_splits_and_folders(tmp_path: Path):
    make(tmp_path, "train", "val")
    with pytest.raises(UserError, match=r"no class folders in .*train \(it is empty\)"):
        list_dataset(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no train/ and val/ in data folder .*empty"):
        list_dataset(tmp_path / "empty")


def test_one_class_is_not_enough(tmp_path: Path):
    with pytest.raises(UserError, match=r"only one class folder, a, in"):
        list_dataset(make(tmp_path, "train/a/1.jpg", "val/a/1.jpg"))


@pytest.mark.parametrize("given", ["data/train", "data/train/a", "."])
def test_a_level_too_deep_or_too_high_gets_a_hint(tmp_path: Path, given: str):
    make(tmp_path / "data", *GOOD)
    with pytest.raises(UserError, match=rf"no train/ and val/ in data folder .*; did you mean {tmp_path / 'data'}\?"):
        list_dataset(tmp_path / given)


def test_a_missing_split_says_what_is_there(tmp_path: Path):
    make(tmp_path, "train/a/1.jpg", "valid/a/1.jpg")
    with pytest.raises(UserError, match=r"no val/ in data folder .* \(it has train, valid\); expected train/<class>/"):
        list_dataset(tmp_path)
