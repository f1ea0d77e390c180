"""The `evmamba` command as people type it: what it prints, where, and with which exit status."""

import subprocess
import sys
from pathlib import Path

import lightning  # noqa: F401  (its log handler keeps the stderr of the first import, which must not be a test's)
import pytest
import torch
import yaml

from evmamba.launch import cli
from evmamba.launch.commands import report
from evmamba.launch.fit.recipes import find_recipe, recipes
from evmamba.launch.store.results import read_result

TINY = "conf/classification/tiny.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the repository, as after `pip install`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evmamba"])


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with exit status 2 and exactly one line on stderr; return the line."""
    assert cli.main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(lines) == 1
    assert lines[0].startswith("evmamba: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("benhc", "unknown command 'benhc'; did you mean bench?"),
        ("--vers", "did you mean --version"),
        ("bench --backbone resnet18", "did you mean --backbones?"),
        ("bench --preset tniy", "unknown preset 'tniy'; did you mean tiny?"),
        ("bench --tasks detektion", "unknown task 'detektion'; did you mean detection"),
        ("bench --detectors retina", "unknown detector 'retina'; did you mean retinanet?"),
        ("bench --device gpu", "unknown device 'gpu'"),
        ("bench --backbones ,", "no backbone to run"),
        ("bench --set max_epochs", "write option=value"),
        ("bench --set cost.steps=3", "unknown option of cost 'steps'; did you mean timed_steps"),
        ("report nowhere", "nowhere: no such file or folder"),
        ("models efficientvmamba_x", "unknown backbone 'efficientvmamba_x'; did you mean efficientvmamba_"),
        ("data embeded", "embedded"),
        ("fit --config conf/detection/tinny.yaml", "did you mean conf/detection/tiny.yaml"),
        (f"fit --config {TINY} --trainer.max_epoch=3", "did you mean --trainer.max_epochs"),
        (f"fit --config {TINY} --model.init_args.backbone=efficientvmamba_x", "did you mean efficientvmamba_"),
        (f"fit --config {TINY} --model.init_args.backbon=resnet18", "did you mean backbone?"),
        (f"fit --config {TINY} --data.init_args.data_dir=nowhere", "data folder not found: nowhere"),
        (f"fit --config {TINY} --ckpt_path=nothing.ckpt", "checkpoint not found: nothing.ckpt"),
        ("fit --model=evmamba.tasks.classification.ClassificationModule", "nothing says which data to use"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_what_would_be_right(
    capsys: pytest.CaptureFixture[str], arguments: str, expected: str
):
    assert expected in complaint(capsys, *arguments.split())


def test_a_broken_recipe_is_named_with_its_line(capsys: pytest.CaptureFixture[str]):
    Path("broken.yaml").write_text("trainer:\n  max_steps: [3\n")
    assert "broken.yaml, line 3, column 1: no valid YAML" in complaint(capsys, "fit", "--config", "broken.yaml")


def test_a_truncated_checkpoint_is_named(capsys: pytest.CaptureFixture[str]):
    Path("torn.ckpt").write_bytes(b"PK\x03\x04 and no more")
    line = complaint(capsys, "fit", "--config", TINY, "--ckpt_path=torn.ckpt")
    assert "torn.ckpt is no checkpoint of Lightning, or it is truncated" in line


def test_weights_alone_are_no_training_to_continue(capsys: pytest.CaptureFixture[str]):
    torch.save({"model": {"weight": torch.zeros(2)}}, "original.pth")
    line = complaint(capsys, "fit", "--config", TINY, "--ckpt_path=original.pth")
    assert "original.pth holds weights only" in line
    assert "--model.init_args.checkpoint=original.pth" in line


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_run_folder_that_cannot_be_written_is_told_before_anything_runs(
    capsys: pytest.CaptureFixture[str], command: str
):
    Path("file").write_text("")
    line = complaint(capsys, command, "--config", TINY, "--trainer.default_root_dir=file")
    assert "cannot write to the output folder file (File exists)" in line


def test_an_output_that_cannot_be_written_is_told_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    Path("file").write_text("")
    assert "cannot write to the output folder file" in complaint(capsys, "bench", "--output", "file")


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch):
    def broken(arguments: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(report, "main", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["report", "x"])


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "main", interrupted)
    assert cli.main(["report", "x"]) == 130
    assert capsys.readouterr().err == "evmamba: interrupted\n"


def test_help_and_version_are_there(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["fit", "--help"]) == cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert "bench" in printed
    assert "conf/segmentation/tiny.yaml" in printed


def test_no_help_waits_for_torch():
    program = (
        "import contextlib, io, sys\n"
        "from evmamba.launch.cli import COMMANDS, main\n"
        "from evmamba.launch.commands.training import TRAINING\n"
        "for arguments in [['--help'], ['--version'], *([command, '--help'] for command in (*COMMANDS, *TRAINING))]:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "        main(arguments)\n"
        "    assert said.getvalue().strip(), arguments\n"
        "    heavy = {'torch', 'timm', 'lightning', 'matplotlib'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


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


def test_a_recipe_on_disk_comes_before_the_packaged_one(capsys: pytest.CaptureFixture[str]):
    Path("conf/classification").mkdir(parents=True)
    Path(TINY).write_text("trainer: {max_steps: 1}\nmodel: {class_path: evmamba.tasks.detection.DetectionModule}\n")
    assert "nothing says which data to use" in complaint(capsys, "fit", "--config", TINY)


def test_test_writes_a_result_and_report_reads_it(capsys: pytest.CaptureFixture[str]):
    options = ["--data.init_args.image_size=32", "--data.init_args.num_workers=0", "--trainer.limit_test_batches=1"]
    assert cli.main(["test", "--config", TINY, *options, "--seed_everything=7"]) == 0
    result = read_result(Path("runs/classification-tiny/result.json"))
    assert (result.task, result.model, result.head) == ("classification", "efficientvmamba_t", "linear")
    assert result.data
    assert result.data["name"] == "embedded"
    assert 0 <= result.metrics["top1"] <= result.metrics["top5"] <= 1
    assert result.protocol["weights"] == "untrained"
    assert result.protocol["image_size"] == 32
    assert result.provenance["seed"] == 7
    assert result.provenance["config"]["data"]["init_args"]["image_size"] == 32
    assert result.gallery
    assert all((result.folder / name).is_file() for name in result.gallery)

    assert cli.main(["report", "runs"]) == 0
    assert "EfficientVMamba-T" in capsys.readouterr().out
    assert "data:image/jpeg" in Path("runs/report.html").read_text()


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
