"""Annotation files: oddities that are read right and faults that are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from evmamba.errors import UserError
from evmamba.tasks.detection.annotations import (
    _rle_fault,
    categories,
    has_mask,
    load_coco_json,
    read_annotations,
    to_rle,
)

IMAGES = [
    {"id": 5, "file_name": "a.jpg", "width": 100, "height": 50},
    {"id": 9, "file_name": "b.jpg", "width": 40, "height": 60},
]
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]


def write(folder: Path, annotations: list[dict], images: list[dict] = IMAGES, cats: list[dict] = CATEGORIES) -> Path:
    path = folder / "instances_train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": cats}))
    return path


def annotation(identity: int = 1, **changes: object) -> dict:
    base = {"id": identity, "image_id": 5, "category_id": 7, "bbox": [10, 10, 20, 20], "iscrowd": 0, "area": 400}
    return base | {"segmentation": [SQUARE]} | changes


def test_labels_follow_ascending_category_ids_over_gaps(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, [annotation(1), annotation(2, category_id=3)]))
    assert read.category_ids == (3, 7)
    assert read.class_names == ("square", "disc")
    assert read.images[0].labels.tolist() == [1, 0]


def test_crowds_and_boxes_of_no_area_are_counted_and_not_trained_on(tmp_path: Path) -> None:
    annotations = [
        annotation(1),
        annotation(2, iscrowd=1, segmentation={"size": [50, 100], "counts": [5000]}),
        annotation(3, bbox=[10, 10, 0, 20]),
        annotation(4, bbox=[10, 10, 20, -3]),
        annotation(5, bbox=[200, 10, 20, 20]),
        annotation(6, bbox=[10, 10, 20, 1e-9]),
    ]
    read = read_annotations(write(tmp_path, annotations), masks=True)
    assert read.images[0].boxes.tolist() == [[10, 10, 30, 30]]
    assert read.counts["crowds"] == 1
    assert read.counts["no_area"] == 4
    assert read.counts["boxes"] == 1
    assert "4 boxes of no area ignored" in read.summary()


def test_boxes_are_clipped_to_their_image(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, [annotation(bbox=[-5, 40, 300, 20])]))
    assert read.images[0].boxes.tolist() == [[0, 40, 100, 50]]
    assert read.counts["clipped"] == 1


def test_images_without_boxes_are_kept(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, [annotation()]))
    assert [len(record.boxes) for record in read.images] == [1, 0]
    assert read.images[1].boxes.shape == (0, 4)
    assert read.counts["without_boxes"] == 1


def test_missing_area_crowd_flag_and_info_are_filled_in(tmp_path: Path) -> None:
    bare = {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4]}
    content = load_coco_json(write(tmp_path, [bare]))
    assert content["annotations"][0]["area"] == 12
    assert content["annotations"][0]["iscrowd"] == 0
    assert content["info"] == {}


def test_category_names_used_twice_get_their_id() -> None:
    cats = [{"id": 1, "name": "cell"}, {"id": 2, "name": "cell"}, {"id": 4, "name": "dust"}]
    assert categories({"categories": cats})[1] == ("cell (1)", "cell (2)", "dust")


def test_null_area_and_crowd_flag_are_filled_in(tmp_path: Path) -> None:
    content = load_coco_json(write(tmp_path, [annotation(bbox=[1, 2, 3, 4], area=None, iscrowd=None)]))
    assert (content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]) == (12, 0)


def test_every_kind_of_segmentation_gives_the_same_mask(tmp_path: Path) -> None:
    """For training and, as pycocotools makes it, for the evaluation."""
    halves = [[10, 10, 20, 10, 20, 30, 10, 30], [20, 10, 30, 10, 30, 30, 20, 30]]
    mask = np.zeros((50, 100), dtype=np.uint8, order="F")
    mask[10:30, 10:30] = 1
    compressed = mask_utils.encode(mask)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F"), [0]]))).tolist()
    counts = np.diff([0, *runs, mask.size]).tolist()
    kinds = [
        [SQUARE],
        SQUARE,
        halves,
        [SQUARE, [1, 2, 3, 4]],
        [[1, 2, 3, 4], SQUARE],
        [[], SQUARE, [1, 2, 3, 4, 5, 6, 7]],
        {"size": [50, 100], "counts": counts},
        {"size": [50, 100], "counts": compressed["counts"].decode()},
    ]
    file = write(tmp_path, [annotation(k + 1, segmentation=kind) for k, kind in enumerate(kinds)])
    evaluated = COCO()
    evaluated.dataset = load_coco_json(file, masks=True)
    evaluated.createIndex()
    trained = read_annotations(file, masks=True).images[0].segmentations
    for k, kind in enumerate(kinds):
        assert np.array_equal(mask_utils.decode(to_rle(trained[k], 50, 100)), mask), kind
        assert np.array_equal(evaluated.annToMask(evaluated.anns[k + 1]), mask), kind


@pytest.mark.parametrize("segmentation", [[], [[1, 2, 3, 4]], [[]], None], ids=["empty", "box", "empty part", "null"])
def test_segmentations_without_a_polygon_are_no_masks(tmp_path: Path, segmentation: object) -> None:
    content = load_coco_json(write(tmp_path, [annotation(segmentation=segmentation)]), masks=True)
    assert not has_mask(content["annotations"][0])


def test_segmentations_may_be_anything_where_no_masks_are_wanted(tmp_path: Path) -> None:
    assert read_annotations(write(tmp_path, [annotation(segmentation="none")])).counts["boxes"] == 1


def test_annotations_without_a_mask_are_left_out_where_masks_are_wanted(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, [annotation(1), annotation(2, segmentation=[])]), masks=True)
    assert len(read.images[0].boxes) == len(read.images[0].segmentations) == 1
    assert read.counts["without_mask"] == 1


def test_masks_are_refused_where_there_are_none(tmp_path: Path) -> None:
    file = write(tmp_path, [annotation(segmentation=[])])
    with pytest.raises(UserError, match=r"holds no masks.*fasterrcnn or retinanet"):
        read_annotations(file, masks=True)
    assert read_annotations(file).counts["boxes"] == 1


IMAGE, CATEGORY = IMAGES[0], CATEGORIES[0]
NAN, INFINITE = float("nan"), float("inf")
NOT_FOUR = "annotation 4: bbox is not four numbers x, y, width, height: "
FAULTS = {
    "unknown image": ({"annotations": [annotation(4, image_id=77)]}, "annotation 4: image_id 77 is not in the file"),
    "image list": ({"annotations": [annotation(4, image_id=[5])]}, r"annotation 4: image_id \[5\] is not in the file"),
    "unknown category": (
        {"annotations": [annotation(4, category_id=8)]},
        "annotation 4: category_id 8 is not in the file",
    ),
    "category list": ({"annotations": [annotation(4, category_id=[7])]}, r"category_id \[7\] is not in the file"),
    "nan box": ({"annotations": [annotation(4, bbox=[1, 2, NAN, 4])]}, NOT_FOUR + ".*nan"),
    "infinite box": ({"annotations": [annotation(4, bbox=[1, 2, 3, INFINITE])]}, NOT_FOUR + ".*inf"),
    "text box": ({"annotations": [annotation(4, bbox=["1", 2, 3, 4])]}, NOT_FOUR + ".*'1'"),
    "null box": ({"annotations": [annotation(4, bbox=None)]}, NOT_FOUR + "None"),
    "short box": ({"annotations": [annotation(4, bbox=[1, 2, 3])]}, NOT_FOUR),
    "two boxes": (
        {"annotations": [annotation(4, bbox=[]), annotation(6, bbox=[]), annotation(5), annotation(7, bbox=[])]},
        NOT_FOUR + r"\[\]; and 2 more",
    ),
    "text area": ({"annotations": [annotation(4, area="400")]}, "annotation 4: area is not a number: '400'"),
    "nan area": ({"annotations": [annotation(4, area=NAN)]}, "annotation 4: area is not a number: nan"),
    "text crowd": ({"annotations": [annotation(4, iscrowd="no")]}, "annotation 4: iscrowd is not 0 or 1: 'no'"),
    "text id": ({"annotations": [annotation("a")]}, "annotation 'a': id is not a whole number"),  # type: ignore[arg-type]
    "repeated id": ({"annotations": [annotation(4), annotation(4)]}, "occur twice in 'annotations'.*4"),
    "no bbox": ({"annotations": [{"id": 1, "image_id": 5, "category_id": 7}]}, "entry 0 of 'annotations' lacks bbox"),
    "no images": ({"annotations": [], "images": []}, "'images' is empty"),
    "no size": ({"annotations": [], "images": [{"id": 1, "file_name": "a.jpg"}]}, "lacks width, height"),
    "zero size": ({"annotations": [], "images": [IMAGE | {"width": 0}]}, "image 5: width of a.jpg is not .*: 0"),
    "id list": ({"annotations": [], "images": [IMAGE | {"id": [5]}]}, r"image \[5\]: id is neither"),
    "mixed ids": ({"annotations": [], "images": [IMAGE, IMAGE | {"id": "b"}]}, "use one kind"),
    "number as name": (
        {"annotations": [], "images": [IMAGE | {"file_name": 5}]},
        "image 5: file_name is not a name: 5",
    ),
    "null as name": ({"annotations": [], "images": [IMAGE | {"file_name": None}]}, "file_name is not a name: None"),
    "category id": ({"annotations": [], "cats": [CATEGORY | {"id": "7"}]}, "category '7': id is not a whole number"),
    "category name": ({"annotations": [], "cats": [CATEGORY | {"name": None}]}, "category 7: name is not text: None"),
    "text mask": ({"annotations": [annotation(4, segmentation="x")]}, "annotation 4: segmentation is neither"),
    "text polygon": ({"annotations": [annotation(4, segmentation=[["1"] * 6])]}, "annotation 4: a polygon is not"),
    "nan polygon": ({"annotations": [annotation(4, segmentation=[[NAN] * 6])]}, "annotation 4: a polygon is not"),
    "mixed polygon": ({"annotations": [annotation(4, segmentation=[SQUARE, 3])]}, "annotation 4: a polygon .*: 3"),
    "mask size": (
        {"annotations": [annotation(4, segmentation={"size": [9, 9], "counts": [81]})]},
        r"annotation 4: the RLE is for size \[9, 9\], but the image is \[50, 100\]",
    ),
    "no counts": ({"annotations": [annotation(4, segmentation={"size": [50, 100]})]}, "annotation 4: .* lacks counts"),
    "no mask size": ({"annotations": [annotation(4, segmentation={"counts": [5000]})]}, "annotation 4: .* lacks size"),
    "few counts": (
        {"annotations": [annotation(4, segmentation={"size": [50, 100], "counts": [10, 20]})]},
        "annotation 4: the RLE's counts do not add up to the image's 5000 pixels",
    ),
    "absolute name": (
        {"annotations": [], "images": [IMAGE | {"file_name": "/etc/x.jpg"}]},
        "leads out of the image fo",
    ),
    "name upwards": ({"annotations": [], "images": [IMAGE | {"file_name": "a/../../x.jpg"}]}, "leads out of the image"),
    "long id": ({"annotations": [annotation(10**30)]}, "id is not a whole number"),
    "float id": ({"annotations": [annotation(1e300)]}, "id is not a whole number"),  # type: ignore[arg-type]
    "long area": ({"annotations": [annotation(4, area=10**60)]}, "annotation 4: area is not a number"),
    "far polygon": (
        {"annotations": [annotation(4, segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]])]},
        "annotation 4: a polygon reaches far beyond its image of 100x50",
    ),
    "long counts": (
        {"annotations": [annotation(4, segmentation={"size": [50, 100], "counts": "oooooo0"})]},
        "annotation 4: the RLE's counts are damaged",
    ),
    "null counts": (
        {"annotations": [annotation(4, segmentation={"size": [50, 100], "counts": None})]},
        "annotation 4: the RLE's counts are neither",
    ),
}


def test_compressed_masks_are_told_from_damaged_ones():
    """pycocotools writes as many pixels as the counts say, wherever that leads."""
    rng = np.random.default_rng(0)
    for size in ((1, 1), (7, 3), (64, 48), (3, 1000), (300, 300)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = np.asfortranarray(rng.random(size) < share, dtype=np.uint8)
            counts = mask_utils.encode(mask)["counts"].decode()
            for text in (counts, counts[:-1], counts + "1", counts[:-1] + chr(ord(counts[-1]) ^ 1)):
                fault = _rle_fault({"size": list(size), "counts": text}, size)
                assert (fault is None) == (text == counts), (size, share, text)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_line_with_the_file(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    file = write(tmp_path, **content)
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(file, masks=True)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{broken", "no valid JSON"), ("[1, 2]", "holds a list"), ('{"images": []}', "'images' is empty")],
    ids=["broken", "list", "no annotations"],
)
def test_files_that_are_not_coco_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "instances_train.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_coco_json(path)
