"""A check of class folders and tar shards finds what a training would stumble over."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from evmamba.tasks.classification.packing import write_shards

from ..damage import add_test, check, found, images_of, the_problem


def packed(root: Path, output: Path) -> Path:
    write_shards(root, output, 50_000, 2, lambda done, total: None)
    return output


def test_jpegs_cut_anywhere_are_found(tmp_path: Path, sound: Path):
    """The quick decoding reads as far as the full one."""
    root = shutil.copytree(sound / "classification", tmp_path / "set")
    pixels = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    victims = [path for path in images_of(root, "train") if path.suffix in (".jpg", ".png")][:4]
    for part, victim in zip((0.1, 0.5, 0.9, 0.99), victims, strict=True):
        Image.fromarray(pixels).save(victim, "JPEG")
        content = victim.read_bytes()
        victim.write_bytes(content[: int(len(content) * part)])
    assert the_problem(root).startswith("error: 4 images of train cannot be read")


def test_classes_that_differ(copy: Callable[[str], Path]):
    root = copy("classification")
    first = sorted((root / "val").iterdir())[0]
    first.rename(first.with_name("zebra"))
    lines = found(root)
    assert lines == [
        f"error: 1 class of train without a folder in val: {first.name}",
        "error: 1 class of val without a folder in train: zebra",
    ]


def test_classes_of_the_test_split_that_differ(copy: Callable[[str], Path], tmp_path: Path):
    root = copy("classification")
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    add_test(root)
    first = sorted((root / "test").iterdir())[0]
    first.rename(first.with_name("zebra"))
    assert found(root)[:2] == [
        f"error: 1 class of train without a folder in test: {first.name}",
        "error: 1 class of test without a folder in train: zebra",
    ]
    # One without class folders has no labels: nothing is tested on it.
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    shutil.copy(images_of(root, "train")[0], root / "test")
    assert "test" not in check(root).splits


def test_missing_splits_and_empty_classes(copy: Callable[[str], Path]):
    root = copy("classification")
    (root / "train" / "empty").mkdir()
    shutil.rmtree(root / "val")
    lines = found(root)
    assert len(lines) == 2
    assert "class folders without images" in lines[0]
    assert "no val/ in data folder" in lines[1]


def test_images_of_val_in_train(copy: Callable[[str], Path]):
    root = copy("classification")
    trained, tested = images_of(root, "train")[0], images_of(root, "val")[0]
    shutil.copy(trained, tested)
    line = the_problem(root)
    assert line == f"warning: 1 image of val in train too, byte for byte: {tested} is {trained}"


def test_shards_are_checked_as_their_folders(sound: Path, tmp_path: Path):
    output = packed(sound / "classification", tmp_path / "shards")
    ours, theirs = check(output), check(sound / "classification")
    assert (ours.layout, ours.problems, ours.per_class) == ("tar shards", [], theirs.per_class)
    assert ours.splits["train"]["shards"] == len(list((output / "train").glob("*.tar"))) > 1

    shutil.copytree(output / "val", output / "test")
    assert check(output).splits["test"] == ours.splits["val"]

    file = output / "train" / "train-000000.tar"
    file.write_bytes(file.read_bytes()[:5000])
    assert f"error: shard {file} is truncated or damaged" in the_problem(output)


def test_images_in_shards_are_decoded(sound: Path, tmp_path: Path):
    root = shutil.copytree(sound / "classification", tmp_path / "folders")
    victim = images_of(root, "val")[2]
    victim.write_bytes(victim.read_bytes()[:-200] + bytes(200))
    line = the_problem(packed(root, tmp_path / "shards"))
    assert line.startswith("error: 1 image of val cannot be read")
    assert f"{victim.relative_to(root / 'val')} in shard {tmp_path / 'shards' / 'val' / 'val-000000.tar'}" in line
