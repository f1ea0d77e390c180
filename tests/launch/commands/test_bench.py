"""`evmamba bench`, from the command line to the report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.launch.store.results import read_result

QUICK_COST = ("cost.timed_steps=1", "cost.warmup_steps=0", "cost.batch_size=1", "cost.training_batch=0")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("bench --backbone resnet18", "did you mean --backbones?"),
        ("bench --preset tniy", "unknown preset 'tniy'; did you mean tiny?"),
        ("bench --tasks detektion", "unknown task 'detektion'; did you mean detection"),
        ("bench --detectors retina", "unknown detector 'retina'; did you mean retinanet?"),
        ("bench --device gpu", "unknown device 'gpu'"),
        ("bench --backbones ,", "no backbone to run"),
        ("bench --set max_epochs", "write option=value"),
        ("bench --set cost.steps=3", "unknown option of cost 'steps'; did you mean timed_steps"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_what_would_be_right(complaint: Callable[..., str], arguments: str, expected: str):
    assert expected in complaint(*arguments.split())


@pytest.mark.usefixtures("elsewhere")
def test_an_output_that_cannot_be_written_is_told_before_anything_runs(complaint: Callable[..., str]):
    Path("file").write_text("")
    assert "cannot write to the output folder file" in complaint("bench", "--output", "file")


@pytest.mark.slow
def test_a_small_bench_from_command_line_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [
        f"--output={tmp_path / 'out'}",
        "--tasks=classification,segmentation",
        "--set=trainer.max_steps=3",
        "--set=trainer.limit_test_batches=1",
        "--set=classification.data.init_args.image_size=32",
        "--set=segmentation.model.init_args.optimizer.lr=1.0e+30",  # no loss is finite after such a step
        "--set=segmentation.model.init_args.schedule.warmup_steps=0",
        *(f"--set={override}" for override in QUICK_COST),
    ]
    assert cli.main(["bench", *options]) == 1
    printed = capsys.readouterr().out
    assert "failed" in printed

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cells = report["rows"][0]["cells"]
    assert [part[0]["state"] for part in cells] == ["measured", "measured", "failed"]
    assert cells[0][0]["text"] == "6.49"
    assert cells[0][1]["text"] == "0.81"
    assert any("the loss is" in note or "no longer finite" in note for note in report["notes"])

    results = {path.parent.name.split("-")[0]: read_result(path) for path in tmp_path.rglob("result.json")}
    trained = results["classification"]
    assert trained.training["steps"] == 3
    assert trained.training["curve"]
    assert trained.protocol["weights"] == "last epoch"
    assert trained.provenance["spec_hash"]
    assert results["segmentation"].status == "failed"
