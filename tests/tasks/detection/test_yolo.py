"""YOLO's layout gives what COCO's gives; what is wrong in it is named by file and line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.check import recognise
from evmamba.tasks.detection import DetectionData

from ..damage import check, found


def as_yolo(coco: Path, root: Path, polygons: bool) -> Path:
    """The same data set in the other layout."""
    for split in ("train", "val"):
        shutil.copytree(coco / "images" / split, root / "images" / split)
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        ids = sorted(category["id"] for category in content["categories"])
        (root / "labels" / split).mkdir(parents=True)
        for image in content["images"]:
            w, h = image["width"], image["height"]
            lines = []
            for a in content["annotations"]:
                if a["image_id"] != image["id"]:
                    continue
                x, y, bw, bh = a["bbox"]
                numbers = [(x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h]
                if polygons:
                    numbers = [n / (w, h)[k % 2] for k, n in enumerate(a["segmentation"][0])]
                lines.append(" ".join(map(str, [ids.index(a["category_id"]), *numbers])))
            (root / "labels" / split / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    names = [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    (root / "data.yaml").write_text(f"train: ../images/train\nval: images/val\nnames: {json.dumps(names)}\n")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("polygons", [False, True])
def test_boxes_and_masks_are_those_of_the_same_data_in_cocos_layout(coco: Path, tmp_path: Path, polygons: bool):
    root = as_yolo(coco, tmp_path / "other" / "yolo", polygons)
    ours, theirs = (DetectionData(str(place), num_workers=0, masks=polygons) for place in (root, coco))
    for data in (ours, theirs):
        data.setup("fit")
    assert ours.class_names == theirs.class_names
    assert ours.category_ids == (0, 1, 2)
    assert len(ours.val_set) == len(theirs.val_set)  # type: ignore[arg-type]
    for k in range(3):
        (image, target, path), (other, expected, other_path) = ours.val_set[k], theirs.val_set[k]
        assert Path(path).name == Path(other_path).name
        assert torch.equal(image, other)
        assert torch.equal(target["labels"], expected["labels"])
        torch.testing.assert_close(target["boxes"], expected["boxes"], atol=1e-3, rtol=0)
        if polygons:
            assert torch.equal(target["masks"], expected["masks"])
    again = DetectionData(str(root), num_workers=0)
    assert again.description()["fingerprint"] == ours.description()["fingerprint"]
    label = min((root / "labels" / "train").iterdir())
    label.write_text("0 0.5 0.5 0.25 0.25\n")
    assert DetectionData(str(root), num_workers=0).description()["fingerprint"] != ours.description()["fingerprint"]


def test_the_layout_tells_the_task_and_the_check_reads_it(coco: Path, tmp_path: Path):
    root = as_yolo(coco, tmp_path / "other" / "yolo", polygons=True)
    assert recognise(root).name == "detection"
    assert [line for line in found(root) if line.startswith("error")] == []


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        (
            "labels/train/0001.txt",
            "0 0.5 0.5 0.2 0.2\n3 0.5 0.5 0.2 0.2",
            "0001.txt, line 2: class 3 is not one of 0 to",
        ),
        ("labels/train/0001.txt", "0 0.5 0.5 0.2", "line 1: 4 numbers are neither a box"),
        ("labels/train/0001.txt", "0 5 5 20 20", "line 1: coordinates are fractions"),
        ("labels/train/0001.txt", "cat 0.5 0.5 0.2 0.2", "is not a class and its numbers"),
        ("data.yaml", "train: images/train\nnames: [a]\n", "has train, val and names"),
        ("data.yaml", "train: nowhere\nval: images/val\nnames: [a, b, c]\n", "train names nowhere, which is not there"),
        ("data.yaml", "train: images/train\nval: images/val\nnames: {1: a}\n", "number the classes from 0 on"),
        ("data.yaml", "train: a\nval: a\nnames: [a]\nkpt_shape: [17, 3]\n", "keypoints"),
        ("data.yaml", "train: labels/train\nval: images/val\nnames: [a]\n", "no image under labels/train"),
    ],
)
def test_what_is_wrong_is_named(coco: Path, tmp_path: Path, file: str, content: str, complaint: str):
    root = as_yolo(coco, tmp_path / "other" / "yolo", polygons=False)
    (root / file).write_text(content)
    with pytest.raises(UserError, match=complaint):
        DetectionData(str(root), num_workers=0)


def test_images_may_be_listed_and_lie_elsewhere(coco: Path, tmp_path: Path):
    root = as_yolo(coco, tmp_path / "other" / "yolo", polygons=False)
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    root.mkdir()
    (root / "train.txt").write_text(f"{moved}/images/train/0001.jpg\n./images/train/0002.jpg\n")
    (root / "data.yaml").write_text(f"path: {moved}\ntrain: train.txt\nval: images/val\nnames: [square, disc, bar]\n")
    data = DetectionData(str(root), num_workers=0)
    train, _ = data.image_paths()
    assert [path.resolve() for path in train] == [moved / "images" / "train" / f"000{k}.jpg" for k in (1, 2)]
    data.setup("fit")
    assert len(data.train_set) == 2  # type: ignore[arg-type]
    assert check(root).errors == 0


@pytest.mark.parametrize("content", ["train: nowhere\nval: nowhere\nnames: [a]\n", "model: yolo\n", "a: b: c"])
def test_another_tools_file_beside_cocos_annotations_changes_nothing(coco: Path, content: str):
    before = DetectionData(str(coco), num_workers=0).description()
    (coco / "data.yaml").write_text(content)
    assert DetectionData(str(coco), num_workers=0).description() == before
    assert next(iter(check(coco).layout.split(","))) == "COCO"


@pytest.mark.parametrize("content", ["model: yolo\n", "train: a\n", "- a\n", "a: b: c"])
def test_another_tools_file_beside_class_folders_does_not_make_them_detection(tmp_path: Path, content: str):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "a.png")
    (tmp_path / "data.yaml").write_text(content)
    assert recognise(tmp_path).name == "classification"


def test_the_data_are_the_same_however_their_path_is_typed(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = as_yolo(coco, tmp_path / "other" / "yolo", polygons=False)
    plain = DetectionData(str(root), num_workers=0).description()["fingerprint"]
    monkeypatch.chdir(coco)
    for typed in (root / ".." / "yolo", "other/yolo", "images/../other/yolo"):
        assert DetectionData(str(typed), num_workers=0).description()["fingerprint"] == plain


def test_a_torn_image_stops_or_is_left_out_as_the_policy_says(coco: Path, tmp_path: Path):
    root = as_yolo(coco, tmp_path / "other" / "yolo", polygons=False)
    (root / "images" / "train" / "0001.jpg").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"1 of 4 train images cannot be read: .*0001\.jpg"):
        DetectionData(str(root), num_workers=0)
    with pytest.warns(UserWarning, match=r"1 of 4 train images cannot be read and are left out: .*0001\.jpg"):
        data = DetectionData(str(root), num_workers=0, on_bad_image="skip")
    data.setup("fit")
    assert len(data.train_set) == 3  # type: ignore[arg-type]
