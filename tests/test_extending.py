"""docs/extending.md: its files, pasted as they stand into an empty folder, are a backbone, a data set and a task."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BIN = Path(sys.executable).parent
# A benchmark of the documented kind, shortened.
SHORT = (
    *("--set", "cost.timed_steps=1", "--set", "cost.warmup_steps=0", "--set", "cost.batch_size=1"),
    *("--set", "cost.training_batch=0", "--set", "trainer.max_steps=2"),
)


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for kind, text in fenced if kind == language]


def commands() -> list[str]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    assert all(line.startswith("evmamba ") for line in lines)
    return lines


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of the page, under the name in its first line."""
    folder = tmp_path_factory.mktemp("pasted")
    for text in (*blocks("python"), *blocks("yaml")):
        path = folder / text.partition("\n")[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def run(folder: Path, line: str, *more: str) -> str:
    """Run a line of the page there; it must succeed."""
    _, *arguments = shlex.split(line)
    environment = os.environ | {"EVMAMBA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("EVMAMBA_IMPORT", None)
    done = subprocess.run(
        [str(BIN / "evmamba"), *arguments, *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def the_line(*words: str) -> str:
    """The page's command that has these words."""
    (line,) = [line for line in commands() if all(word in line for word in words)]
    return line


def test_every_block_is_a_file_or_a_command():
    assert all(re.match(r"# [\w./]+\n", text) for text in (*blocks("python"), *blocks("yaml")))
    assert len(commands()) == 9


@pytest.mark.slow
def test_the_backbone_stands_in_the_benchmarks_table(pasted: Path):
    line = the_line("my_networks:my_net").replace(",efficientvmamba_t", "")
    text = run(pasted, line, "--tasks", "classification", "--output", "backbone", *SHORT)
    assert "my_net" in text
    results = [json.loads(path.read_text()) for path in pasted.glob("backbone/runs/*/result.json")]
    assert {(result["task"], result["status"]) for result in results} == {
        ("cost", "finished"),
        ("classification", "finished"),
    }


def test_the_backbone_has_maps_for_detection_and_segmentation(pasted: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from evmamba.tasks.backbones import build_backbone

    monkeypatch.chdir(pasted)
    monkeypatch.setattr(sys, "path", [*sys.path])
    maps = build_backbone("my_networks:my_net", features_only=True)(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]


@pytest.mark.slow
def test_the_data_set_is_trained_on_and_tested(pasted: Path):
    folder = pasted / "photographs"
    folder.mkdir()
    rows = [(split, f"{split}{k}.png", ("red", "blue")[k % 2]) for split in ("train", "val") for k in range(8)]
    for _, name, colour in rows:
        Image.new("RGB", (70, 50), colour).save(folder / name)
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    for command in ("fit", "test"):
        run(pasted, the_line(f"evmamba {command} ", "my_recipe.yaml"))
    (result,) = [json.loads(path.read_text()) for path in pasted.glob("runs/*-my_recipe/result.json")]
    assert list(result["details"]["per_class"]) == ["blue", "red"]
    assert (result["data"]["train_images"], result["data"]["val_images"]) == (8, 8)
    assert result["gallery"]  # pictures of predictions, of a data module that says nothing about them


@pytest.mark.slow
def test_the_fourth_task_walks_through_the_house(pasted: Path):
    """Fit, test, bench, table, predict and data check, with nothing edited but the folder of the task."""
    run(pasted, the_line("evmamba fit", "hue"))
    run(pasted, the_line("evmamba test", "hue"))
    result = json.loads((pasted / "runs/hue-tiny/result.json").read_text())
    assert (result["task"], result["head"], result["model"]) == ("hue", "angle", "resnet10t")
    assert 0 <= result["metrics"]["error"] <= 180

    told = run(pasted, the_line("evmamba bench", "hue"), *SHORT)
    assert "hue error (degrees)" in told
    assert "mIoU" not in told
    (trained,) = [json.loads(path.read_text()) for path in pasted.glob("bench/runs/hue-resnet10t-*/result.json")]
    table = run(pasted, the_line("evmamba report"))
    assert f"{trained['metrics']['error']:.1f}" in table

    Image.new("RGB", (40, 30), "lime").save(pasted / "picture.png")
    run(pasted, the_line("evmamba predict"))
    (entry,) = json.loads((pasted / "predictions/predictions.json").read_text())["images"]
    assert 0 <= entry["hue"] < 360
    assert (pasted / "predictions" / entry["picture"]).is_file()

    for split in ("train", "val"):
        (pasted / "my_hues" / f"hue_{split}").mkdir(parents=True)
        Image.new("RGB", (9, 9), "red" if split == "val" else "lime").save(pasted / f"my_hues/hue_{split}/7.png")
    assert "hue, pictures named by their hue" in run(pasted, the_line("data check"))


def test_an_entry_point_needs_no_import(pasted: Path):
    """As pip installs it: metadata beside the package."""
    installed = pasted / "hue-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hue\nVersion: 1.0\n")
    toml = blocks("toml")[0].partition("\n")[2]
    (installed / "entry_points.txt").write_text("[evmamba.tasks]\n" + toml.replace('"', ""))
    code = "from evmamba.tasks import TASKS; print(*TASKS, TASKS['hue'].default_head.name)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pasted.parent,
        env=os.environ | {"PYTHONPATH": str(pasted)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["classification", "detection", "segmentation", "hue", "angle"]


def test_the_pasted_recipes_are_yaml():
    assert all(yaml.safe_load(text) for text in blocks("yaml"))
