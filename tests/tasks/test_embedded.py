"""The drawn data sets: the same bytes every time, valid layouts, and made safely by several processes."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from evmamba.errors import UserError
from evmamba.tasks import TASKS
from evmamba.tasks.embedded import (
    CLASSIFICATION_CLASSES,
    DETECTION_CATEGORIES,
    SEGMENTATION_CLASSES,
    cache,
    ensure_embedded,
    write_classification,
    write_detection,
    write_segmentation,
)
from evmamba.tasks.embedded.outlines import annotation, polygons


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


def test_classification_folders_hold_the_counts_asked_for(tmp_path: Path) -> None:
    write_classification(tmp_path, train=23, val=10, size=48)
    for split, count in (("train", 23), ("val", 10)):
        folders = sorted(p.name for p in (tmp_path / split).iterdir())
        assert folders == sorted(CLASSIFICATION_CLASSES)
        images = list((tmp_path / split).glob("*/*.jpg"))
        assert len(images) == count
        assert {Image.open(p).size for p in images} == {(48, 48)}
        assert {len(list(p.iterdir())) for p in (tmp_path / split).iterdir()} <= {count // 10, count // 10 + 1}


def test_classification_can_be_limited_to_some_classes(tmp_path: Path) -> None:
    write_classification(tmp_path / "a", train=4, val=2, size=32, classes=("ring", "star"))
    assert sorted(p.name for p in (tmp_path / "a" / "val").iterdir()) == ["ring", "star"]
    with pytest.raises(ValueError, match="10 classes need as many images"):
        write_classification(tmp_path / "b", train=20, val=9)
    with pytest.raises(UserError, match="did you mean star"):
        write_classification(tmp_path / "c", train=2, val=2, classes=("strar",))
    assert not (tmp_path / "b").exists()


def test_colour_alone_does_not_give_the_class_away(tmp_path: Path) -> None:
    write_classification(tmp_path, train=300, val=200, size=32)
    features, labels = {}, {}
    for split in ("train", "val"):
        paths = sorted((tmp_path / split).glob("*/*.jpg"))
        features[split] = np.stack([np.asarray(Image.open(p), dtype=float).mean(axis=(0, 1)) for p in paths])
        labels[split] = np.array([CLASSIFICATION_CLASSES.index(p.parent.name) for p in paths])
    centres = np.stack([features["train"][labels["train"] == k].mean(axis=0) for k in range(10)])
    distances = np.linalg.norm(features["val"][:, None] - centres, axis=2)
    accuracy = (distances.argmin(axis=1) == labels["val"]).mean()
    assert accuracy < 0.2, f"nearest mean colour reaches {accuracy:.2f}, chance is 0.10"


@pytest.fixture(scope="module")
def detection_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("detection")
    write_detection(root, train=32, val=16, size=128)
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_areas_and_masks_of_the_detection_set_agree(split: str, detection_set: Path) -> None:
    coco = COCO(detection_set / "annotations" / f"instances_{split}.json")
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == DETECTION_CATEGORIES
    assert {p.name for p in (detection_set / "images" / split).iterdir()} == {
        i["file_name"] for i in coco.imgs.values()
    }
    for image_id, image in coco.imgs.items():
        assert Image.open(detection_set / "images" / split / image["file_name"]).size == (
            image["width"],
            image["height"],
        )
        covered = np.zeros((image["height"], image["width"]), dtype=int)
        for instance in coco.imgToAnns[image_id]:
            mask = coco.annToMask(instance)
            covered += mask
            assert mask.sum() == instance["area"] > 0
            rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
            assert instance["bbox"] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert covered.max(initial=0) <= 1, "two objects own the same visible pixel"


def test_the_detection_set_holds_what_makes_coco_hard(detection_set: Path) -> None:
    coco = COCO(detection_set / "annotations" / "instances_train.json")
    counts = [len(coco.imgToAnns[i]) for i in coco.imgs]
    assert 0 in counts
    assert max(counts) >= 4
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert crowds
    assert all(isinstance(a["segmentation"], dict) for a in crowds)
    assert {a["category_id"] for a in coco.anns.values()} == set(DETECTION_CATEGORIES)
    assert any(len(a["segmentation"]) > 1 for a in coco.anns.values() if not a["iscrowd"]), "no occluded object"
    assert len({(i["width"], i["height"]) for i in coco.imgs.values()}) > 4


def _ring() -> np.ndarray:
    mask = np.zeros((9, 11), dtype=bool)
    mask[1:8, 1:10] = True
    mask[3:6, 4:6] = mask[4, 7] = False
    return mask


def _masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    corner = np.zeros((4, 4), dtype=bool)
    corner[1, 1] = corner[2, 2] = True
    noise = [rng.random((int(h), int(w))) < p for p in (0.3, 0.6, 0.85) for h, w in rng.integers(2, 24, (10, 2))]
    return [_ring(), ~_ring(), corner, np.ones((3, 5), dtype=bool), *(mask for mask in noise if mask.any())]


def test_polygons_and_run_lengths_give_back_every_pixel() -> None:
    for mask in _masks():
        height, width = mask.shape
        outlines = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons(mask), height, width)))
        np.testing.assert_array_equal(outlines, mask)
        runs = annotation(mask, crowd=True)["segmentation"]
        np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(runs, height, width)), mask)


def test_segmentation_labels_fit_their_images_and_name_every_class(tmp_path: Path) -> None:
    write_segmentation(tmp_path, train=24, val=12, size=112)
    assert (tmp_path / "classes.txt").read_text().split() == list(SEGMENTATION_CLASSES)
    for split, count in (("training", 24), ("validation", 12)):
        images = sorted((tmp_path / "images" / split).glob("*.jpg"))
        labels = sorted((tmp_path / "annotations" / split).glob("*.png"))
        assert [p.stem for p in images] == [p.stem for p in labels]
        assert len(images) == count
        pixels = np.zeros(256, dtype=int)
        for image, label in zip(images, labels, strict=True):
            opened = Image.open(label)
            assert opened.mode == "L"
            assert opened.size == Image.open(image).size == (112, 84)
            pixels += np.bincount(np.asarray(opened).ravel(), minlength=256)
        share = pixels / pixels.sum()
        assert pixels[len(SEGMENTATION_CLASSES) + 1 :].sum() == 0
        assert (share[1 : len(SEGMENTATION_CLASSES) + 1] > 0.002).all(), share
        assert 0.01 < share[0] < 0.12, "the unlabelled lines should be thin"


VERSION = TASKS["segmentation"].embedded.version


def _few(root: Path, **numbers: int) -> None:
    write_segmentation(root, train=6, val=2, size=64)


def _ensure(root: Path, barrier: object) -> None:
    cache.load = lambda reference: _few
    barrier.wait()  # type: ignore[attr-defined]
    ensure_embedded("segmentation", root)


def _ensure_and_hang(root: Path, started: object) -> None:
    def write(folder: Path, **numbers: int) -> None:
        _few(folder)
        started.set()  # type: ignore[attr-defined]
        time.sleep(60)

    cache.load = lambda reference: write
    ensure_embedded("segmentation", root)


def test_the_set_is_made_once_and_then_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(cache, "load", lambda reference: lambda root, **numbers: (calls.append(numbers), _few(root)))
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "chosen"))
    folder = ensure_embedded("segmentation")
    assert folder.parent == tmp_path / "chosen"
    assert ensure_embedded("segmentation") == folder
    assert calls == [{"train": 200, "val": 50}]
    task = TASKS["segmentation"]
    newer = dataclasses.replace(task, embedded=dataclasses.replace(task.embedded, version=VERSION + 1))
    monkeypatch.setitem(TASKS._tasks, "segmentation", newer)
    assert ensure_embedded("segmentation") != folder
    assert len(calls) == 2


def test_processes_that_start_together_share_one_complete_set(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_ensure, args=(tmp_path, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    _few(tmp_path / "expected")
    assert _files(tmp_path / f"segmentation-v{VERSION}") == _files(tmp_path / "expected")
    assert not list(tmp_path.glob(".*partial*"))


def test_a_killed_generation_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_ensure_and_hang, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert not (tmp_path / f"segmentation-v{VERSION}").exists()
    monkeypatch.setattr(cache, "load", lambda reference: _few)
    folder = ensure_embedded("segmentation", tmp_path)
    assert (folder / "classes.txt").is_file()
    assert not list(tmp_path.glob(".*partial*")), "the killed process's files are still there"


def test_an_interrupted_generation_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(root: Path, **numbers: int) -> None:
        _few(root)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "load", lambda reference: interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_embedded("segmentation", tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_an_unwritable_cache_says_how_to_choose_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set EVMAMBA_CACHE") as caught:
        ensure_embedded("detection")
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_offers_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean detection"):
        ensure_embedded("detecton")
