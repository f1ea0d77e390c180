"""A folder of results, so that store and report are tested without a training; the command as people type it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from evmamba.launch import cli
from evmamba.launch.store.results import write_result

from .handmade import HEADS, made_result


@pytest.fixture
def result_folder(tmp_path: Path) -> Path:
    """Two models: one complete, one with a failed detection and a segmentation that never ran."""
    return write_two_models(tmp_path / "results")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the repository, as after `pip install`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evmamba"])


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with exit status 2 and exactly one line on stderr; returns the line."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
        assert line.startswith("evmamba: ")
        return line

    return run


def write_two_models(root: Path) -> Path:
    results = [made_result(task, "efficientvmamba_t") for task in HEADS]
    results += [made_result("cost", "resnet18"), made_result("classification", "resnet18")]
    results[-1].metrics["top1"] = 0.79
    results.append(
        made_result(
            "detection", "resnet18", status="failed", reason="loss is nan at step 3 (a.jpg)", metrics={}, details={}
        )
    )
    for result in results:
        folder = root / result.run
        if result.task == "detection" and result.finished:
            (folder / "gallery").mkdir(parents=True)
            Image.new("RGB", (900, 600), "teal").save(folder / "gallery" / "000.jpg")
            result.gallery = ["gallery/000.jpg"]
        write_result(result, folder)
    return root
