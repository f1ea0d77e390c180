"""`evmamba fit` and its kind: recipes of the package, of the disk, and modules of one's own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning  # noqa: F401  (its log handler keeps the stderr of the first import, which must not be a test's)
import pytest
import torch
import yaml

from evmamba.launch import cli
from evmamba.launch.fit.recipes import find_recipe, recipes

from ..tiny import write_images

pytestmark = pytest.mark.usefixtures("elsewhere")

TINY = "conf/classification/tiny.yaml"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("fit --config conf/detection/tinny.yaml", "did you mean conf/detection/tiny.yaml"),
        (f"fit --config {TINY} --trainer.max_epoch=3", "did you mean --trainer.max_epochs"),
        (f"fit --config {TINY} --model.init_args.backbone=efficientvmamba_x", "did you mean efficientvmamba_"),
        (f"fit --config {TINY} --model.init_args.backbon=resnet18", "did you mean backbone"),
        (f"fit --config {TINY} --data.init_args.data_dir=nowhere", "data folder not found: nowhere"),
        (f"fit --config {TINY} --ckpt_path=nothing.ckpt", "checkpoint not found: nothing.ckpt"),
        (f"test --config {TINY} --ckpt_path=best.ckpt", "checkpoint not found: best.ckpt"),
        ("fit --model=evmamba.tasks.classification.ClassificationModule", "nothing says which data to use"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_what_would_be_right(complaint: Callable[..., str], arguments: str, expected: str):
    assert expected in complaint(*arguments.split())


def test_a_broken_recipe_is_named_with_its_line(complaint: Callable[..., str]):
    Path("broken.yaml").write_text("trainer:\n  max_steps: [3\n")
    assert "broken.yaml, line 3, column 1: no valid YAML" in complaint("fit", "--config", "broken.yaml")


def test_a_truncated_checkpoint_is_named(complaint: Callable[..., str]):
    Path("torn.ckpt").write_bytes(b"PK\x03\x04 and no more")
    line = complaint("fit", "--config", TINY, "--ckpt_path=torn.ckpt")
    assert "torn.ckpt is no checkpoint of Lightning, or it is truncated" in line


def test_weights_alone_are_no_training_to_continue(complaint: Callable[..., str]):
    torch.save({"model": {"weight": torch.zeros(2)}}, "original.pth")
    line = complaint("fit", "--config", TINY, "--ckpt_path=original.pth")
    assert "original.pth holds weights only" in line
    assert "--model.init_args.checkpoint=original.pth" in line


def test_fine_tuning_may_end_before_its_first_validation(tmp_path: Path):
    write_images("classification", tmp_path / "data")
    options = {"model.init_args.backbone": "resnet10t", "data.init_args.data_dir": tmp_path / "data"}
    options |= {"data.init_args.image_size": 32, "data.init_args.batch_size": 4, "data.init_args.num_workers": 0}
    options |= {"model.init_args.checkpoint": "null", "trainer.max_steps": 1, "trainer.accelerator": "cpu"}
    given = [f"--{name}={value}" for name, value in options.items()]
    assert cli.main(["fit", "--config", "conf/classification/finetune.yaml", *given]) == 0
    assert next(tmp_path.rglob("last.ckpt"))
    assert "val/top1" not in next(tmp_path.rglob("metrics.csv")).read_text()


def test_early_stop_looks_at_validations_alone():
    """Lightning looks at the end of an epoch too, and fails where none was validated yet."""
    stops = [
        callback["init_args"]["check_on_train_epoch_end"]
        for recipe in recipes()
        for callback in yaml.safe_load(find_recipe(recipe).read_text())["trainer"].get("callbacks", [])
        if callback["class_path"].endswith("EarlyStopping")
    ]
    assert stops == [False] * 3


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_run_folder_that_cannot_be_written_is_told_before_anything_runs(complaint: Callable[..., str], command: str):
    Path("file").write_text("")
    line = complaint(command, "--config", TINY, "--trainer.default_root_dir=file")
    assert "cannot write to the output folder file (File exists)" in line


def test_every_packaged_recipe_fits_its_classes(capsys: pytest.CaptureFixture[str]):
    names = recipes()
    assert {f"conf/{task}/tiny.yaml" for task in ("classification", "detection", "segmentation")} <= set(names)
    for name in names:
        with pytest.raises(SystemExit) as ended:
            cli.main(["fit", "--config", name, "--print_config"])
        assert ended.value.code == 0, name
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["model"]["class_path"].startswith("evmamba.tasks."), name
        assert config["trainer"]["use_distributed_sampler"] is False, name


def test_a_recipe_on_disk_comes_before_the_packaged_one(complaint: Callable[..., str]):
    Path("conf/classification").mkdir(parents=True)
    Path(TINY).write_text("trainer: {max_steps: 1}\nmodel: {class_path: evmamba.tasks.detection.DetectionModule}\n")
    assert "nothing says which data to use" in complaint("fit", "--config", TINY)


def test_a_recipe_may_name_classes_of_an_imported_module_that_lies_where_one_stands(tmp_path: Path):
    (tmp_path / "my_data.py").write_text(
        "from evmamba.tasks.classification import ClassificationData\n\n\nclass MyData(ClassificationData):\n    pass\n"
    )
    recipe = find_recipe(TINY).read_text()
    (tmp_path / "my.yaml").write_text(
        recipe.replace("evmamba.tasks.classification.ClassificationData", "my_data.MyData")
    )
    # -P: the interpreter does not add the folder by itself, as it does not for a console script.
    command = [sys.executable, "-P", "-m", "evmamba.launch.cli", "fit", "--config", "my.yaml", "--print_config"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert refused.returncode == 2
    assert "--import my_data" in refused.stderr
    command += ["--import", "my_data"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "class_path: my_data.MyData" in done.stdout


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_training_fits_a_screen_and_names_every_recipe(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    folder, told = "", []
    for word in printed.partition("recipes:")[2].partition("\nevmamba")[0].split():
        if word.endswith("/"):
            folder = word
            continue
        stem, _, letters = word.partition("{")
        told += [f"{folder}{stem}{letter}.yaml" for letter in letters.rstrip("}").split(",")]
    assert sorted(told) == recipes()


def test_the_whole_help_has_the_options_of_a_recipes_classes(capsys: pytest.CaptureFixture[str]):
    typed = ["--config", "conf/detection/tiny.yaml", "--help-all", "--trainer.max_epochs=3"]
    assert cli.main(["fit", *typed]) == 0
    printed = capsys.readouterr().out
    assert set(recipes()) <= set(printed.split())
    for option in ("--trainer.max_epochs", "--model.min_size", "--model.optimizer.layer_decay", "--data.batch_size"):
        assert option in printed
