"""A trained network tested as ONNX files: the same test, by onnxruntime, beside the numbers of PyTorch."""

from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.fit import exported
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.fit.training import evaluate, fit_and_test
from evmamba.launch.report.build import report_from
from evmamba.launch.store.results import read_result
from evmamba.launch.store.spec import EvaluationSpec, Start, TrainingSpec

pytest.importorskip("onnxruntime")


def specs() -> tuple[TrainingSpec, EvaluationSpec]:
    told = [
        ("model.init_args.backbone", "resnet10t"),
        ("trainer.max_steps", 2),
        ("trainer.limit_test_batches", 2),
        ("trainer.log_every_n_steps", 1),
        ("data.init_args.num_workers", 0),
        ("data.init_args.batch_size", 4),
        ("data.init_args.image_size", 64),
    ]
    same = {"task": "classification", "model": "resnet10t", "head": "linear", "seed": 0, "device": "cpu"}
    training = TrainingSpec(**same, settings=settings_of(find_recipe("conf/classification/tiny.yaml"), told))
    return training, EvaluationSpec(**same, settings=training.settings, start=Start.of(training), exported=True)


def test_the_exported_network_is_tested_beside_the_trained_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exported, "CALIBRATION_IMAGES", 6)
    training, evaluation = specs()
    fit_and_test(training, tmp_path / "runs" / training.name)
    folder = tmp_path / "runs" / evaluation.name
    evaluate(evaluation, folder)
    result = read_result(folder / "result.json")
    assert result.metrics["onnx_top1"] == pytest.approx(result.metrics["top1"])
    assert 0 <= result.metrics["int8_top1"] <= 1
    assert result.cost["int8_mb"] < result.cost["onnx_mb"] / 3
    assert result.cost["onnx_latency_ms"] > 0
    details = result.details["exported"]
    assert details["calibration_images"] == 6
    assert details["runtime"].startswith("onnxruntime ")
    assert sorted(file.name for file in (folder / "exported").iterdir()) == ["int8.onnx", "onnx.onnx"]

    table = report_from([tmp_path])
    (group,) = table.groups
    assert [column.header for column in group.columns][-6:] == [
        f"{form} {unit}" for form in ("ONNX", "INT8") for unit in (group.columns[0].header, "(MB)", "(ms)")
    ]
    assert table.rows[0].cells[0][-6].value == pytest.approx(100 * result.metrics[f"onnx_{group.columns[0].key}"])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Trainer:
        world_size = 2

    with pytest.raises(UserError, match="by one process"):
        exported.measure_exported(Trainer(), None, None, tmp_path)  # type: ignore[arg-type]
