"""`evmamba data check` finds what a training would stumble over, and nothing in sound data; `evmamba data shard`."""

import json
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from evmamba.errors import UserError
from evmamba.launch import cli
from evmamba.launch.datacheck import LabelOptions, check_data, recognise
from evmamba.launch.datafindings import DataCheck, print_check
from evmamba.tasks.embedded import write_classification, write_detection, write_segmentation

WRITERS = {"classification": write_classification, "detection": write_detection, "segmentation": write_segmentation}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVMAMBA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for task, write in WRITERS.items():
        write(root / task, train=20, val=10)
    return root


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A data set to damage."""
    return lambda task: shutil.copytree(sound / task, tmp_path / task)


def check(root: Path, task: str | None = None, jobs: int = 1, **labels: Any) -> DataCheck:
    return check_data(root, task, jobs, Console(file=StringIO()), LabelOptions(**labels))


def found(root: Path, **options: Any) -> list[str]:
    """Every problem as one line."""
    problems = check(root, **options).problems
    return [f"{problem.level}: {problem.text}: {'; '.join(problem.examples)}" for problem in problems]


def the_problem(root: Path, **options: Any) -> str:
    problems = found(root, **options)
    assert len(problems) == 1, problems
    return problems[0]


def images_of(root: Path, split: str) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png") and split in path.parts)


def edit(root: Path, change: Callable[[dict], None], split: str = "train") -> Path:
    (file,) = root.glob(f"annotations/*{split}*.json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


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


def test_shards_are_checked_as_their_folders(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "shards"
    arguments = ["data", "shard", str(sound / "classification"), str(output), "--shard-size", "50KB", "--jobs", "2"]
    assert cli.main(arguments) == 0
    assert "train" in capsys.readouterr().out
    ours, theirs = check(output), check(sound / "classification")
    assert (ours.layout, ours.problems, ours.per_class) == ("tar shards", [], theirs.per_class)
    assert ours.splits["train"]["shards"] == len(list((output / "train").glob("*.tar"))) > 1

    file = output / "train" / "train-000000.tar"
    file.write_bytes(file.read_bytes()[:5000])
    assert f"error: shard {file} is truncated or damaged" in the_problem(output)


def test_images_in_shards_are_decoded(sound: Path, tmp_path: Path):
    root = shutil.copytree(sound / "classification", tmp_path / "folders")
    victim = images_of(root, "val")[2]
    victim.write_bytes(victim.read_bytes()[:-200] + bytes(200))
    assert cli.main(["data", "shard", str(root), str(tmp_path / "shards")]) == 0
    line = the_problem(tmp_path / "shards")
    assert line.startswith("error: 1 image of val cannot be read")
    assert f"{victim.relative_to(root / 'val')} in shard {tmp_path / 'shards' / 'val' / 'val-000000.tar'}" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["annotations"].append(c["annotations"][0]), "error: .*ids occur twice in 'annotations'"),
        (lambda c: c["images"].append(c["images"][0]), "error: .*ids occur twice in 'images'"),
        (lambda c: c["annotations"][2].update(image_id=99999), "error: .*image_id 99999 is not in the file"),
        (lambda c: c["annotations"][2].update(category_id=99999), "error: .*category_id 99999 is not in the file"),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), "error: .*bbox is not four numbers"),
        (lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 9]), "warning: 1 box of no area in .*; not trained on"),
        (lambda c: c["annotations"][0].update(bbox=[-9, 3, 30, 30]), "warning: 1 box reaching outside the image"),
        (lambda c: c["annotations"][0].update(segmentation=[["x"]]), "warning: masks that cannot be used.*polygon"),
        (lambda c: c["images"][1].update(width=33), "error: 1 image of train of another size than annotated: .*33x"),
        (lambda c: c["images"][1].update(file_name="no.jpg"), "error: 1 image named in .* and not in .*no.jpg"),
        (lambda c: c["categories"][0].update(name="kraken"), "error: the categories of train and val differ: .*kraken"),
    ],
)
def test_faulty_annotations(copy: Callable[[str], Path], change: Callable[[dict], None], expected: str):
    root = copy("detection")
    edit(root, lambda content: content["annotations"].sort(key=lambda annotation: annotation["iscrowd"]))
    edit(root, change)
    lines = found(root)
    assert any(re.match(expected, line) for line in lines), lines


def test_classes_that_are_evaluated_and_never_trained(copy: Callable[[str], Path]):
    root = copy("detection")

    def drop(content: dict) -> None:
        category = content["categories"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != category]

    edit(root, drop)
    assert the_problem(root).startswith("warning: 1 class with boxes in val and none in train: ")


def test_images_without_annotations_are_counted(copy: Callable[[str], Path]):
    root = copy("detection")
    folder = images_of(root, "val")[0].parent
    shutil.copy(images_of(root, "val")[0], folder / "extra.jpg")
    assert the_problem(root) == f"warning: 1 image in {folder} and not named in instances_val.json: extra.jpg"


def test_labels_out_of_range_and_of_the_wrong_size(copy: Callable[[str], Path]):
    root = copy("segmentation")
    labels = sorted((root / "annotations" / "training").iterdir())
    pixels = np.array(Image.open(labels[0]))
    pixels[:2] = 200
    Image.fromarray(pixels).save(labels[0])
    Image.fromarray(pixels[:, :-1] % 2).save(labels[1])
    labels[2].write_bytes(b"no label")
    lines = found(root)
    assert lines[0].startswith("error: 1 label file of train cannot be read: ")
    assert lines[1].startswith(f"error: 1 label file of train of another size than the image: label {labels[1]} is")
    assert lines[2].startswith("error: 1 label out of range")
    assert f"200 in {labels[0]}" in lines[2]
    assert len(lines) == 3
    assert len(found(root, reduce_zero_label=True, ignore_label=200)) == 2


def test_classes_without_names_are_counted_from_the_labels(copy: Callable[[str], Path]):
    root = copy("segmentation")
    named = check(root).splits["train"]["classes"]
    (root / "classes.txt").unlink()
    assert (
        the_problem(root)
        == f"warning: no classes.txt; the highest label is {named}, so there would be {named} classes: "
    )
    assert found(root, num_classes=named) == []


def test_a_label_without_image(copy: Callable[[str], Path]):
    root = copy("segmentation")
    next((root / "images" / "validation").iterdir()).unlink()
    assert any("label without image of the same name" in line for line in found(root))


def test_layouts_are_told_apart(sound: Path, tmp_path: Path):
    assert [recognise(sound / task) for task in WRITERS] == list(WRITERS)
    with pytest.raises(UserError, match=r"layout of no task \(it has classification, detection, segmentation\)"):
        recognise(sound)
    both = shutil.copytree(sound / "classification", tmp_path / "both")
    shutil.copytree(sound / "detection" / "annotations", both / "annotations")
    with pytest.raises(UserError, match="layouts of classification and detection; say which one with --task"):
        recognise(both)
    assert check(both, task="classification").problems == []


def test_command_prints_writes_and_ends_with_its_status(
    copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = copy("classification")
    file = tmp_path / "check.json"
    assert cli.main(["data", "check", str(root), "--jobs", "1", "--json", str(file)]) == 0
    assert "ready: nothing found (30 images in" in capsys.readouterr().out
    images_of(root, "val")[0].write_bytes(b"")
    assert cli.main(["data", "check", str(root), "--jobs", "1", "--json", str(file)]) == 1
    assert "not ready: 1 error (30 images in" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert (written["task"], written["ready"], written["problems"][0]["level"]) == ("classification", False, "error")
    assert sum(counts["val"] for counts in written["per_class"].values()) == 10


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("chekc .", "unknown action of evmamba data 'chekc'; did you mean check?"),
        ("check nowhere", "data folder not found: nowhere"),
        ("check . --task detektion", "did you mean detection"),
        ("check . --jobs 0", "0 is not a whole number above 0"),
        ("check . --jsn x", "did you mean --json"),
        ("shard . out --shard-size huge", "--shard-size huge is not a size; write it like 300MB"),
        ("shard . out --shard-size 0MB", "--shard-size 0MB is not a size"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: str, expected: str):
    assert cli.main(["data", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_names_with_brackets_are_printed_as_they_are(copy: Callable[[str], Path]):
    root = copy("classification")
    victim = images_of(root, "val")[0]
    victim.unlink()
    victim.with_name("[red]x[bold].png").write_bytes(b"")
    stream = StringIO()
    print_check(check(root), Console(file=stream, width=300))
    assert "[red]x[bold].png" in stream.getvalue()
