"""One classifier tested at several sizes: the same weights, the same test, and the training's own log untouched."""

from pathlib import Path

import pytest

from evmamba.launch.bench import run
from evmamba.launch.fit.recipes import find_recipe
from evmamba.launch.store.results import read_result
from evmamba.launch.store.spec import RunSpec


def test_a_training_is_tested_at_other_sizes_too(tmp_path: Path):
    spec = RunSpec(
        "classification",
        "resnet10t",
        "linear",
        0,
        "cpu",
        None,
        recipe=str(find_recipe("conf/classification/tiny.yaml")),
        arguments=[
            "--model.init_args.backbone=resnet10t",
            "--trainer.max_steps=3",
            "--trainer.limit_test_batches=1",
            "--trainer.log_every_n_steps=1",
            "--data.init_args.image_size=64",
            "--data.init_args.num_workers=0",
        ],
        test_scales=[2.0, 1.0, 0.1],
        suite="resolution",
    )
    spec.write(tmp_path)
    assert run.main([str(tmp_path / "spec.json")]) == 0
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
