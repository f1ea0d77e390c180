"""A model card says what is known of these very weights, and its snippet runs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from evmamba.launch import cli
from evmamba.launch.store.results import Result, write_result
from evmamba.launch.use.model_card import result_of

from ..handmade import made_result
from .conftest import NAMES, checkpoint


def run_of(folder: Path, weights: str) -> tuple[Path, Result]:
    """A run's folder: a checkpoint, and beside it the result of a test."""
    (folder / "checkpoints").mkdir(parents=True)
    path, _ = checkpoint("classification", folder / "checkpoints")
    result = made_result(
        "classification",
        "efficientvmamba_t",
        protocol={"weights": weights, "image_size": 64},
        training={"epochs": 3, "steps": 120},
    )
    result.data |= {"name": "insects", "train_images": 900}  # type: ignore[operator]
    write_result(result, folder)
    return path, result


def test_a_pushed_network_has_metrics_usage_and_provenance(tmp_path: Path):
    path, _ = run_of(tmp_path / "run", "EMA of the best epoch by val/top1")
    assert cli.main(["push", str(path), str(tmp_path / "hub"), "--license=cc-by-4.0"]) == 0
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "More Information Needed" not in text
    for said in (
        "| top-1 (%) | 81.3 |",
        "On 120 validation images of insects (fingerprint `f00d`)",
        "3 classes: ant, bee, cat.",
        "training data: 900 images of insects",
        "length: 3 epochs, 120 steps",
        "commit `0123456789ab`",
        "device: Some CPU, 2 cores, float32",
    ):
        assert said in text, said
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.pipeline_tag == "image-classification"
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"top1": 81.34, "top5": 99.0}
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.fromarray(np.zeros((80, 90, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", f"{snippet}\nprint(tuple(outputs.shape))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == [f"(1, {len(NAMES)})"], done.stderr


@pytest.mark.parametrize("weights", ["last epoch", "checkpoint /elsewhere/best.ckpt", "untrained"])
def test_numbers_of_other_weights_are_not_claimed(tmp_path: Path, weights: str):
    path, result = run_of(tmp_path / "run", weights)
    assert result_of(path) is None
    assert cli.main(["push", str(path), str(tmp_path / "hub")]) == 0
    assert "No test of these weights was given" in (tmp_path / "hub" / "README.md").read_text()
    file = tmp_path / "run" / "result.json"
    assert cli.main(["push", str(path), str(tmp_path / "told"), f"--result={file}"]) == 0
    assert f"{100 * result.metrics['top1']:.1f}" in (tmp_path / "told" / "README.md").read_text()


def test_a_test_of_the_file_itself_counts(tmp_path: Path):
    path, result = run_of(tmp_path / "run", "")
    result.protocol["weights"] = f"checkpoint {path}"
    write_result(result, tmp_path / "run")
    assert result_of(path) is not None


def test_a_pyramid_says_whose_numbers_they_are(tmp_path: Path):
    torch.manual_seed(0)
    path, _ = checkpoint("detection", tmp_path)
    write_result(made_result("detection", "efficientvmamba_t", protocol={"weights": "best epoch"}), tmp_path)
    assert cli.main(["push", str(path), str(tmp_path / "hub"), "--backbone"]) == 0
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "Of the whole network that it was trained in, on 40 validation images" in text
    assert "evmamba.FeaturePyramid.from_pretrained" in text
