"""The data module: layouts, images that differ from their annotations, transforms, real data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.detection import DetectionData
from evmamba.tasks.detection.data import RangeCrop

from .handmade import box, coco_images, write_coco

EXIF_ORIENTATION = 0x0112


def edit(root: Path, split: str, **sections: object) -> None:
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | sections))


def set_up(root: Path, **options: object) -> DetectionData:
    data = DetectionData(str(root), num_workers=0, **options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_both_layouts_read_the_same(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("layout2017")
    (other / "annotations").mkdir()
    for split in ("train", "val"):
        shutil.copytree(coco / "images" / split, other / f"{split}2017")
        shutil.copy(
            coco / "annotations" / f"instances_{split}.json", other / "annotations" / f"instances_{split}2017.json"
        )
    first, second = set_up(coco).val_set, set_up(other).val_set
    for k in range(5):
        assert torch.equal(first[k][0], second[k][0])
        assert torch.equal(first[k][1]["boxes"], second[k][1]["boxes"])
    assert Path(second[0][2]) == other / "val2017" / "0101.jpg"


def test_samples_hold_what_was_annotated(coco: Path) -> None:
    data = set_up(coco, masks=True)
    assert data.class_names == ["square", "disc", "bar"]
    assert data.category_ids == (3, 7, 90)
    image, target, _ = data.val_set[0]
    assert image.dtype == torch.float32
    assert 0.9 < image.max() <= 1
    assert target["image_id"] == 101
    assert target["boxes"].tolist() == [[5, 8, 29, 38], [35, 8, 59, 43], [65, 8, 89, 48]]
    assert target["labels"].tolist() == [2, 1, 0]
    for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
        assert mask.sum() == mask[y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("flip", ["horizontal_flip", "vertical_flip"])
def test_flips_move_boxes_and_masks_with_the_pixels(coco: Path, flip: str) -> None:
    plain = set_up(coco, horizontal_flip=0.0, masks=True).train_set[1]
    flipped = set_up(coco, masks=True, **{"horizontal_flip": 0.0, flip: 1.0}).train_set[1]
    axis = -1 if flip == "horizontal_flip" else -2
    assert torch.equal(flipped[0], plain[0].flip(axis))
    assert torch.equal(flipped[1]["masks"], plain[1]["masks"].flip(axis))
    for mask, (x1, y1, x2, y2) in zip(flipped[1]["masks"], flipped[1]["boxes"].int().tolist(), strict=True):
        assert mask[y1:y2, x1:x2].all()


def test_a_random_crop_cuts_boxes_and_masks_with_the_pixels(coco: Path) -> None:
    """Every part that is left of a box is full of its mask, is within the image, and keeps its label."""
    data = set_up(coco, horizontal_flip=0.0, masks=True, random_crop=1.0)
    whole = set_up(coco, horizontal_flip=0.0, masks=True).train_set[1]
    sizes, left = set(), []
    for seed in range(40):
        torch.manual_seed(seed)
        image, target, _ = data.train_set[1]
        sizes.add(tuple(image.shape[1:]))
        left.append(len(target["boxes"]))
        assert len(target["labels"]) == len(target["masks"]) == len(target["boxes"])
        assert set(target["labels"].tolist()) <= set(whole[1]["labels"].tolist())
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            assert 0 <= x1 < x2 <= image.shape[2]
            assert 0 <= y1 < y2 <= image.shape[1]
            assert mask.sum() == mask[y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)
    assert len(sizes) > 10
    assert min(left) < len(whole[1]["boxes"]) == max(left)
    _, empty, _ = data.train_set[3]
    assert empty["boxes"].shape == (0, 4)


@pytest.mark.parametrize("size", [(480, 640), (2000, 300), (427, 640), (30, 40), (1, 1)])
def test_a_random_crop_is_384_to_600_pixels_of_an_image_scaled_to_400_to_600(size: tuple[int, int]) -> None:
    crop = RangeCrop()
    image = torch.empty(3, *size)
    for _ in range(200):
        found = crop.make_params([image])
        short = min(size)
        scales = [min(side / short, 1333 / max(size)) for side in (400, 500, 600)]
        for start, length, whole in (
            (found["top"], found["height"], size[0]),
            (found["left"], found["width"], size[1]),
        ):
            assert 0 <= start <= whole - length
            # Half a pixel of rounding in the scaled, another in the unscaled image.
            slack = 0.5 + 0.5 / min(scales)
            assert length >= min(384 / max(scales), whole) - slack
            assert length <= min(600 / min(scales), whole) + slack


def test_images_without_boxes_train_or_not_as_wanted(coco: Path) -> None:
    kept, dropped = set_up(coco, masks=True), set_up(coco, train_without_boxes=False)
    assert len(kept.train_set) == 4
    assert len(dropped.train_set) == 3
    assert len(dropped.val_set) == 5
    _, target, _ = kept.train_set[3]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 64, 96)


def test_evaluation_is_one_image_a_batch(coco: Path) -> None:
    batches = list(set_up(coco, batch_size=3).val_dataloader())
    assert [len(batch["images"]) for batch in batches] == [1] * 5


@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_exif_rotation_follows_the_annotated_size(tmp_path: Path, annotated: str) -> None:
    """A bright stripe at the left of the stored pixels is at the top of the upright picture."""
    stored = np.zeros((40, 60, 3), dtype=np.uint8)
    stored[:, :10] = 255
    width, height = (40, 60) if annotated == "upright" else (60, 40)
    images = coco_images(1, width=width, height=height)
    for split in ("train", "val"):
        write_coco(tmp_path, split, images, [box(1, 1, 3, [0, 0, 8, 8])])
        picture = Image.fromarray(stored)
        exif = picture.getexif()
        exif[EXIF_ORIENTATION] = 6
        picture.save(tmp_path / "images" / split / "0001.jpg", exif=exif)
    image = set_up(tmp_path).val_set[0][0]
    assert image.shape == (3, height, width)
    bright, dark = (image[:, :8], image[:, 14:]) if annotated == "upright" else (image[:, :, :8], image[:, :, 14:])
    assert bright.min() > 0.9
    assert dark.max() < 0.1


def test_image_of_another_size_is_named(coco: Path) -> None:
    Image.new("RGB", (64, 96)).save(coco / "images" / "train" / "0002.jpg")
    with pytest.raises(
        UserError, match=r"1 images differ in size .*instances_train.json: 0002.jpg is 64x96, not 96x64"
    ):
        set_up(coco)


def test_missing_image_is_named_or_skipped(coco: Path) -> None:
    (coco / "images" / "train" / "0002.jpg").unlink()
    message = r"instances_train.json names 1 images that are not in .*train \(0002.jpg\)"
    with pytest.raises(UserError, match=message):
        set_up(coco)
    with pytest.raises(UserError, match=message):
        DetectionData(str(coco)).description()
    with pytest.warns(UserWarning, match="0002.jpg"):
        data = set_up(coco, on_bad_image="skip")
    assert len(data.train_set) == 3
    assert data.description()["train_images"] == 3


def test_categories_must_agree_between_splits(coco: Path) -> None:
    edit(coco, "train", categories=[{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}, {"id": 90, "name": "bar"}])
    with pytest.raises(UserError, match=r"differ: box \(id 3\), square \(id 3\)"):
        set_up(coco)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_boxes_is_refused(coco: Path, split: str) -> None:
    edit(coco, split, annotations=[])
    with pytest.raises(UserError, match=f"instances_{split}.json has no usable box"):
        set_up(coco)


def test_folders_that_are_not_coco_are_refused_at_once(tmp_path: Path, coco: Path) -> None:
    with pytest.raises(UserError, match="no detection data in"):
        DetectionData(str(coco / "images"))
    shutil.rmtree(coco / "images" / "val")
    with pytest.raises(UserError, match=r"its image folder .*val is not"):
        DetectionData(str(coco))


def test_description_notices_changed_annotations(coco: Path) -> None:
    before = DetectionData(str(coco)).description()
    assert (before["train_images"], before["val_images"], before["num_classes"]) == (4, 5, 3)
    edit(coco, "val", annotations=[box(1, 101, 3, [0, 0, 8, 8])])
    assert DetectionData(str(coco)).description()["fingerprint"] != before["fingerprint"]


def test_description_notices_a_change_that_leaves_the_size(coco: Path) -> None:
    before = DetectionData(str(coco)).description()["fingerprint"]
    assert DetectionData(str(coco)).description()["fingerprint"] == before
    file = coco / "annotations" / "instances_train.json"
    text = file.read_text()
    file.write_text(text.replace("[5, 8, 24, 30]", "[6, 8, 24, 30]", 1))
    assert len(file.read_text()) == len(text)
    assert file.read_text() != text
    assert DetectionData(str(coco)).description()["fingerprint"] != before


def test_file_names_may_be_in_folders(coco: Path) -> None:
    for split in ("train", "val"):
        folder = coco / "images" / split
        (folder / "street").mkdir()
        images = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())["images"]
        for image in images:
            (folder / image["file_name"]).rename(folder / "street" / image["file_name"])
            image["file_name"] = f"street/{image['file_name']}"
        edit(coco, split, images=images)
    data = set_up(coco)
    assert data.description()["train_images"] == 4
    assert len(data.description()["fingerprint"]) == 16
    (batch, *_) = data.train_dataloader()
    assert all(Path(path).is_file() for path in batch["path"])
    assert len(data.val_set[0][1]["boxes"]) == 3


def test_bccd_counts(real_data: Callable[[str], Path]) -> None:
    data = set_up(real_data("det_bccd"))
    assert (len(data.train_set), len(data.val_set)) == (205, 87)
    assert data.counts["train"]["boxes"] == 2804
    assert data.counts["val"]["boxes"] == 1137
    assert data.counts["train"]["no_area"] == data.counts["val"]["no_area"] == 1
    with pytest.raises(UserError, match="use detector fasterrcnn or retinanet"):
        set_up(data.root, masks=True)


def test_coco_gaps_crowds_and_masks(real_data: Callable[[str], Path]) -> None:
    data = set_up(real_data("det_coco"), masks=True)
    assert data.num_classes == 80
    assert data.category_ids[-1] == 90
    assert (data.counts["train"]["boxes"], data.counts["train"]["crowds"]) == (935, 10)
    assert (data.counts["val"]["boxes"], data.counts["val"]["crowds"]) == (367, 4)
    for image, target, _ in (data.val_set[k] for k in range(10)):
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].round().int().tolist(), strict=True):
            assert mask.sum() > 0
            assert mask.sum() == mask[max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3].sum()
