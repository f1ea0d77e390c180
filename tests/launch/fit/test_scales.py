"""One classifier tested at several sizes: the same weights, the same test, and the training's own log untouched."""

from pathlib import Path

import pytest

from evmamba.launch.fit.cli import settings_of
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.fit.training import fit_and_test
from evmamba.launch.store.results import read_result
from evmamba.launch.store.spec import TrainingSpec


def test_a_training_is_tested_at_other_sizes_too(tmp_path: Path):
    options = [
        ("model.init_args.backbone", "resnet10t"),
        ("trainer.max_steps", 3),
        ("trainer.limit_test_batches", 1),
        ("trainer.log_every_n_steps", 1),
        ("data.init_args.image_size", 64),
        ("data.init_args.num_workers", 0),
    ]
    spec = TrainingSpec(
        task="classification",
        model="resnet10t",
        head="linear",
        seed=0,
        device="cpu",
        settings=settings_of(find_recipe("conf/classification/tiny.yaml"), options),
        test_scales=(2.0, 1.0, 0.1),
        suite="resolution",
    )
    fit_and_test(spec, tmp_path)
    result = read_result(tmp_path / "result.json")
    assert result.suite == "resolution"
    points = result.sweeps["input_size"]
    assert [point["input_size"] for point in points] == [32, 64, 128]
    same = points[1]
    assert {name: same[name] for name in result.metrics} == pytest.approx(result.metrics)
    assert points[0]["loss"] != points[2]["loss"]
    assert result.protocol["image_size"] == 64
    assert result.training["images"] == 3 * 16
    assert "train/loss" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
