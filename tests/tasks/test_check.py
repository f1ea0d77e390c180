"""`evmamba data check` finds what a training would stumble over, and nothing in sound data, whatever the task."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks.check import recognise

from .damage import WRITERS, add_test, check, found, images_of


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("task", WRITERS)
def test_sound_data_is_ready_and_counted(sound: Path, task: str, jobs: int):
    result = check(sound / task, jobs=jobs)
    assert (result.task, result.problems, result.images) == (task, [], 30)
    assert [result.splits[split]["images"] for split in ("train", "val")] == [20, 10]
    if task == "classification":
        assert sum(counts["train"] for counts in result.per_class.values()) == 20
    if task == "detection":
        (file,) = (sound / task).glob("annotations/*val*.json")
        annotations = json.loads(file.read_text())["annotations"]
        boxes = sum(not annotation["iscrowd"] for annotation in annotations)
        assert result.splits["val"]["boxes"] == boxes == sum(counts["val"] for counts in result.per_class.values())


@pytest.mark.parametrize("task", WRITERS)
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_unreadable_images_are_named(copy: Callable[[str], Path], task: str, damage: str):
    root = copy(task)
    victim = images_of(
        root / "images" if task != "classification" else root, "train" if task != "segmentation" else "training"
    )[3]
    content = victim.read_bytes()
    victim.write_bytes(
        {"truncated": content[: len(content) * 2 // 3], "empty": b"", "text": b"<html>404</html>"}[damage]
    )
    lines = found(root)
    assert lines[0].startswith("error: 1 image of train cannot be read: cannot read image")
    assert str(victim) in lines[0]
    assert len(lines) == 1


@pytest.mark.parametrize("task", WRITERS)
def test_a_labelled_test_split_is_looked_at_like_the_others(copy: Callable[[str], Path], task: str):
    root = copy(task)
    add_test(root)
    result = check(root)
    assert (result.images, result.splits["test"]) == (40, result.splits["val"])
    assert all(counts["test"] == counts["val"] for counts in result.per_class.values())
    assert [problem.text for problem in result.problems] == ["10 images of test in val too, byte for byte"]
    for victim in images_of(root, "test"):
        if victim.parent.parent.name != "annotations":
            victim.write_bytes(b"")
    assert found(root)[0].startswith("error: 10 images of test cannot be read: cannot read image")


def test_layouts_are_told_apart(sound: Path, tmp_path: Path):
    assert [recognise(sound / task).name for task in WRITERS] == list(WRITERS)
    with pytest.raises(UserError, match=r"layout of no task \(it has classification, detection, segmentation\)"):
        recognise(sound)
    both = shutil.copytree(sound / "classification", tmp_path / "both")
    shutil.copytree(sound / "detection" / "annotations", both / "annotations")
    with pytest.raises(UserError, match="layouts of classification and detection; say which one with --task"):
        recognise(both)
    assert check(both, task="classification").problems == []


def test_an_option_of_another_task_is_refused(sound: Path):
    with pytest.raises(UserError, match="--num-classes says nothing about detection"):
        check(sound / "detection", num_classes=3)
