"""Loaders, the description of the data and options that all tasks share."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks import TASKS, Task
from evmamba.tasks import data as data_of_tasks
from evmamba.tasks.classification.packing import write_shards

from .toy import ToyData


@pytest.mark.slow
def test_an_error_that_nobody_catches_ends_the_process_and_those_that_load_for_it(tmp_path: Path):
    """They ignore SIGTERM, by which Python would end them before it waits for them."""
    code = (
        "import multiprocessing\n"
        "from evmamba.tasks.classification import ClassificationData\n"
        "data = ClassificationData(image_size=32, batch_size=8, num_workers=2)\n"
        "data.setup('fit')\n"
        "def train():\n"
        "    batches = iter(data.train_dataloader())\n"
        "    next(batches)\n"
        "    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
        "    raise RuntimeError('a bug')\n"
        "train()\n"
    )
    said, told = tmp_path / "said", tmp_path / "told"  # a pipe would end only with the last process that has it
    with said.open("w") as stdout, told.open("w") as stderr:
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=stderr, check=False, timeout=300)
    workers = [int(number) for number in said.read_text().split()]
    assert not any(Path(f"/proc/{number}").exists() for number in workers)
    assert len(workers) == 2
    assert done.returncode == 1
    assert "RuntimeError: a bug" in told.read_text()


def test_a_short_last_batch_is_dropped_unless_it_is_all_there_is(tmp_path: Path):
    def sizes(n: int) -> list[int]:
        data = ToyData(tmp_path, [1.0] * n, batch_size=4)
        data.setup("fit")
        return [len(batch["path"]) for batch in data.train_dataloader()]

    assert sizes(10) == [4, 4]
    assert sizes(3) == [3]


def test_a_batch_without_room_in_shared_memory_is_an_error_and_no_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A limit of a file's size stands for a full /dev/shm."""

    def limited(worker: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2, 2))

    monkeypatch.setattr(data_of_tasks, "outlive_signals", limited)
    data = ToyData(tmp_path, [1.0] * 4, batch_size=4, num_workers=1)
    data.setup("fit")
    loading: Any = iter(data.val_dataloader())
    with pytest.raises(RuntimeError, match=r"file </torch_\d.*: File too large"):
        next(loading)
    loading._shutdown_workers()


def test_description_changes_with_the_files(tmp_path: Path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    data = ToyData(tmp_path, [])
    first = data.description()
    assert (first["name"], first["train_images"], first["num_classes"]) == (tmp_path.name, 2, 2)
    assert data.description() == first
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert data.description()["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize("limit", [data_of_tasks.MAX_HASHED_BYTES, 0], ids=["contents", "times"])
def test_fingerprint_changes_with_labels_of_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int):
    monkeypatch.setattr(data_of_tasks, "MAX_HASHED_BYTES", limit)
    label = tmp_path / "label.txt"
    label.write_text("cat")
    first = data_of_tasks.fingerprint(tmp_path, [], ["a"], [label])
    assert data_of_tasks.fingerprint(tmp_path, [], ["a"], [label]) == first
    label.write_text("dog")
    os.utime(label, ns=(1, 1))
    assert data_of_tasks.fingerprint(tmp_path, [], ["a"], [label]) != first


def test_fingerprint_of_files_outside_the_root(tmp_path: Path):
    (tmp_path / "root").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    one, other = (data_of_tasks.fingerprint(tmp_path / "root", [tmp_path / name], []) for name in ("a.png", "b.png"))
    assert one != other


def test_unreadable_images_stop_or_are_left_out(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    data = ToyData(tmp_path, [])
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"1 of 2 train images cannot be read: .*b\.png"):
        data.readable(files, "train")
    data.on_bad_image = "skip"
    with pytest.warns(UserWarning, match=r"1 of 2 train images .*b\.png"):
        assert data.readable(files, "train") == [tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("options", "message"), [({"batch_size": 0}, "batch_size"), ({"num_workers": -1}, "num_workers")]
)
def test_options_out_of_range_are_named(tmp_path: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ToyData(tmp_path, [1.0], **options)


def test_missing_data_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"data folder not found: .*nowhere"):
        ToyData(tmp_path / "nowhere", [1.0])


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.embedded], ids=lambda task: task.name)
def test_held_out_images_are_training_images_that_are_not_trained_on(sound: Path, task: Task):
    def made(stage: str, **options: Any) -> Any:
        module = locate(task.data)(str(sound / task.name), num_workers=0, held_out=0.25, **options)
        module.setup(stage)
        return module

    data = made("fit")
    trained, held = ([part[k][2] for k in range(len(part))] for part in (data.train_set, data.val_set))
    assert sorted(trained + held) == sorted(map(str, data.image_paths()[0]))
    assert len(held) == 5
    described = data.description()
    assert (described["split"], described["test_images"]) == ("held out", len(held))
    other = made("test", seed=7, batch_size=2)
    assert [other.val_set[k][2] for k in range(len(other.val_set))] == held
    with pytest.raises(UserError, match="holds out 0"):
        made("fit").held_out_rows(["only one"])


# Where a split lies in the embedded data's layouts: of validation, and of a test split beside it.
THIRD_SPLITS = {
    "classification": [("val", "test")],
    "detection": [("images/val", "images/test"), ("annotations/instances_val.json", "annotations/instances_test.json")],
    "segmentation": [("images/validation", "images/test"), ("annotations/validation", "annotations/test")],
}


@pytest.mark.parametrize("task", THIRD_SPLITS)
def test_a_labelled_test_split_is_what_the_test_stage_is_on(copy: Callable[[str], Path], task: str):
    root = copy(task)

    def made(stage: str, **options: Any) -> Any:
        module = locate(TASKS[task].data)(str(root), num_workers=0, **options)
        module.setup(stage)
        return module

    def tested(module: Any) -> list[str]:
        return [path for batch in module.test_dataloader() for path in batch["path"]]

    before = made("fit").description()
    assert before["split"] == "val"
    assert tested(made("fit")) == [str(path) for path in made("fit").image_paths()[1]]
    for val, test in THIRD_SPLITS[task]:
        (shutil.copytree if (root / val).is_dir() else shutil.copy)(root / val, root / test)
    data = made("test")
    assert tested(data) == [str(path) for path in data.test_paths()]
    assert all("/test/" in path for path in tested(data))
    described = data.description()
    assert (described["split"], described["test_images"]) == ("test", before["val_images"])
    assert described["fingerprint"] != before["fingerprint"]
    fitted = made("fit")
    assert not any("/test/" in path for batch in fitted.val_dataloader() for path in batch["path"])
    # What is chosen on held-out images must not see it.
    assert made("test", held_out=0.25).description()["split"] == "held out"
    assert not any("/test/" in path for path in tested(made("test", held_out=0.25)))


def test_a_test_split_without_labels_is_none(copy: Callable[[str], Path]):
    root = copy("classification")
    (root / "test").mkdir()
    shutil.copy(next((root / "val").rglob("*.*")), root / "test")
    assert locate(TASKS["classification"].data)(str(root)).description()["split"] == "val"


def test_shards_keep_the_test_split(copy: Callable[[str], Path], tmp_path: Path):
    root = copy("classification")
    shutil.copytree(root / "val", root / "test")
    assert set(write_shards(root, tmp_path / "shards", shard_bytes=10_000, jobs=1)) == {"train", "val", "test"}
    folders, shards = (locate(TASKS["classification"].data)(str(place)) for place in (root, tmp_path / "shards"))
    assert shards.description() | {"name": "", "root": ""} == folders.description() | {"name": "", "root": ""}
    assert shards.has_test
