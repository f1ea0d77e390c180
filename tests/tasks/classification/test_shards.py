"""Tar shards: they give what the folders give, to the bit; a damaged one is named before training starts."""

import gzip
import io
import os
import shutil
import tarfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.classification import ClassificationData, ClassificationModule, shards
from evmamba.tasks.classification.folders import read_folders
from evmamba.tasks.classification.shards import read_members, read_shards

from .conftest import SMALL, data

pytestmark = pytest.mark.usefixtures("cache")


def names(batches: list[dict], root: Path) -> list[list[str]]:
    return [[str(Path(path).relative_to(root)) for path in batch["path"]] for batch in batches]


def tar(file: Path, **members: bytes) -> Path:
    """Write a shard; in the names `__` stands for the dot before the suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), "teal").save(stream, "PNG")
    return stream.getvalue()


def test_shards_describe_themselves_as_their_folders(folders: Path, packed: Path):
    ours, theirs = data(packed), data(folders)
    assert ours.class_names == theirs.class_names == ["ant", "bee", "cat"]
    same = ("train_images", "val_images", "num_classes", "fingerprint")
    assert [ours.description()[key] for key in same] == [theirs.description()[key] for key in same]
    assert ours.description()["train_images"] == 21


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_the_folders_with_any_number_of_workers(folders: Path, packed: Path, workers: int):
    random = {"auto_augment": "rand-m9-mstd0.5", "random_erasing": 0.25}
    ours, theirs = data(packed, num_workers=workers, **random), data(folders, **random)
    for stage in ("train", "val"):
        found, expected = (list(getattr(module, f"{stage}_dataloader")()) for module in (ours, theirs))
        assert names(found, packed) == names(expected, folders)
        assert [batch["label"].tolist() for batch in found] == [batch["label"].tolist() for batch in expected]
        for batch, other in zip(found, expected, strict=True):
            assert torch.equal(batch["image"], other["image"])


def test_evaluation_result_is_that_of_the_folders(folders: Path, packed: Path, tmp_path: Path):
    results = []
    for root in (folders, packed):
        torch.manual_seed(0)
        module = ClassificationModule("resnet10t", 3)
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.test(module, ClassificationData(str(root), **SMALL), verbose=False)
        found = module.evaluation
        results.append((found.metrics, found.details, {n: picture.tobytes() for n, picture in found.pictures.items()}))
    assert len(results[0][2]) == 12  # eight spread over the data, the four worst
    assert results[0] == results[1]


def test_processes_share_the_images_without_padding(packed: Path):
    seen: list[str] = []
    for rank in range(4):
        module = data(packed)
        module.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        seen += [path for batch in module.val_dataloader() for path in batch["path"]]
    assert sorted(seen) == sorted(str(path) for path in module.image_paths()[1])


def test_headers_are_read_once_and_again_when_a_shard_changes(copied: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []

    def counting(file: Path) -> list:
        read.append(file)
        return read_members(file)

    monkeypatch.setattr(shards, "read_members", counting)
    ClassificationData(str(copied), **SMALL)
    assert len(read) == len(list(copied.rglob("*.tar")))
    read.clear()
    ClassificationData(str(copied), **SMALL)
    assert read == []
    os.utime(copied / "val" / "val-000000.tar")
    ClassificationData(str(copied), **SMALL)
    assert {file.parent.name for file in read} == {"val"}


def test_a_cache_that_cannot_be_written_does_not_matter(packed: Path, cache: Path):
    cache.write_text("not a folder")
    assert data(packed).description()["train_images"] == 21


def test_shards_of_others_are_read(tmp_path: Path):
    """Flat names as on the Hugging Face hub, labels in JSON, further members, no class names."""
    extra = {"a__txt": b"caption", "a__json": b'{"label": 7}'}
    tar(tmp_path / "in1k-train-0000.tar", a__png=png(), a__cls=b"1\n", **extra)
    tar(tmp_path / "in1k-train-0001.tar", b__json=b'{"label": 0}', b__png=png())
    tar(tmp_path / "in1k-validation-00.tar", v__png=png(), v__cls=b"0", w__png=png(), w__cls=b"1")
    module = data(tmp_path)
    assert module.class_names == ["0", "1"]
    assert module.train_set.images.labels.tolist() == [0, 1]
    (tmp_path / "classes.json").write_text('["tench", "goldfish"]')
    assert ClassificationData(str(tmp_path), **SMALL).class_names == ["tench", "goldfish"]


def third_image(file: Path) -> tarfile.TarInfo:
    with tarfile.open(file) as archive:
        return archive.getmembers()[4]


@pytest.mark.parametrize("where", ["in an image", "between members", "after the last"])
def test_a_truncated_shard_is_named(copied: Path, where: str):
    file = copied / "train" / "train-000001.tar"
    member = third_image(file)
    content = file.read_bytes()
    place = {
        "in an image": member.offset_data + 700,
        "between members": member.offset,
        "after the last": len(content.rstrip(b"\0")) + 300,
    }
    assert content.endswith(bytes(1024))
    file.write_bytes(content[: place[where]])
    with pytest.raises(UserError, match=rf"shard {file} is truncated or damaged \(.*\); copy it again"):
        ClassificationData(str(copied), **SMALL)


def test_a_damaged_header_in_the_middle_is_not_the_end(copied: Path):
    file = copied / "train" / "train-000001.tar"
    content = bytearray(file.read_bytes())
    content[third_image(file).offset + 20] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"shard {file} is truncated or damaged"):
        ClassificationData(str(copied), **SMALL)


def test_a_shard_cut_after_the_start_is_named(copied: Path):
    module = data(copied)
    for file in copied.rglob("*.tar"):
        os.truncate(file, 600)
    with pytest.raises(UserError, match=r"shard .*val-00000\d\.tar has become shorter"):
        list(module.val_dataloader())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a__png": png()}, r"shard .*x\.tar has no label .* for a\.png"),
        ({"a__cls": b"1"}, r"shard .*x\.tar has no image for a"),
        ({"a__png": png(), "a__jpg": png(), "a__cls": b"1"}, r"x\.tar: a\.png and a\.jpg have the same key"),
        ({"a__png": png(), "a__cls": b"cat"}, r"a\.cls in shard .*x\.tar holds no class number: b'cat'"),
        ({"a__png": png(), "a__cls": b"-1"}, r"a\.cls in shard .*x\.tar holds no class number"),
        ({"a__png": png(), "a__json": b'{"class": 1}'}, r"a\.json in shard .*x\.tar holds no class number"),
        ({"a__txt": b"x"}, r"shard .*x\.tar holds no images"),
        ({"a__png": png(), "a__cls": b"3"}, r"a\.png in shard .*x\.tar has class 3, but .* names 3 classes, 0\.\.2"),
    ],
)
def test_what_is_wrong_in_a_shard_is_said(copied: Path, members: dict[str, bytes], message: str):
    tar(copied / "train" / "x.tar", **members)
    with pytest.raises(UserError, match=message):
        ClassificationData(str(copied), **SMALL)


def test_the_same_image_in_two_shards_is_named(copied: Path):
    shutil.copy(copied / "val" / "val-000000.tar", copied / "val" / "val-000000 (1).tar")
    with pytest.raises(UserError, match=r"is in two shards, .*val-000000 \(1\)\.tar and .*val-000000\.tar"):
        ClassificationData(str(copied), **SMALL)


def test_missing_splits_and_classes_are_named(copied: Path):
    shutil.rmtree(copied / "val")
    with pytest.raises(UserError, match=r"no val shards in .*; expected .*val/\*\.tar"):
        ClassificationData(str(copied), **SMALL)
    tar(copied / "val" / "0.tar", a__png=png(), a__cls=b"0", b__png=png(), b__cls=b"2")
    with pytest.raises(UserError, match=r"classes without images in the val shards of .*: bee$"):
        ClassificationData(str(copied), **SMALL)


def test_compressed_shards_are_refused(copied: Path):
    file = copied / "train" / "train-000001.tar"
    file.write_bytes(gzip.compress(file.read_bytes()))
    with pytest.raises(UserError, match=rf"shard {file} is truncated or damaged"):
        ClassificationData(str(copied), **SMALL)


@pytest.mark.parametrize("damage", ["no image at all", "cut"])
def test_unreadable_images_in_shards_stop_or_are_skipped(copied: Path, damage: str):
    broken = b"\x89PNG broken" if damage == "no image at all" else png()[:-30]
    tar(copied / "train" / "x.tar", bad__png=broken, bad__cls=b"1")
    with pytest.raises(UserError, match=r"1 of 22 train images cannot be read: .*bad\.png in shard .*x\.tar"):
        data(copied)
    with pytest.warns(UserWarning, match=r"1 of 22 train images .*bad\.png"):
        assert len(data(copied, on_bad_image="skip").train_set) == 21


def test_more_shards_than_may_be_open_at_once(packed: Path, folders: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_opened", lru_cache(maxsize=1)(shards._Descriptor))
    before = len(list(Path("/proc/self/fd").iterdir()))
    images, expected = read_shards(packed, remember=False)[0]["train"], read_folders(folders)[0]["train"]
    assert [images.content(k) for k in range(21)] == [expected.path(k).read_bytes() for k in range(21)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
