"""A recipe runs no code that the user has not named, whatever way it names it."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """
model: {model}
data: {{class_path: evmamba.tasks.classification.ClassificationData, init_args: {{data_dir: embedded}}}}
{more}
"""
GOOD = "{class_path: evmamba.tasks.classification.ClassificationModule, init_args: {backbone: efficientvmamba_t}}"
WAYS = {
    "class": ("{class_path: evil.Module}", ""),
    "short form": ("evil.Module", ""),
    "backbone": (GOOD.replace("efficientvmamba_t", "'evil:net'"), ""),
    "callback": (GOOD, "trainer: {callbacks: [{class_path: evil.Module}]}"),
    "logger": (GOOD, "trainer: {logger: evil.Module}"),
    "optimizer's value": (GOOD.replace("efficientvmamba_t", "{class_path: evil.Module}"), ""),
    "another file": ("other.yaml", ""),
    "standard library": (GOOD, "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch ran}}]}"),
    "loader of torch": (GOOD, "trainer: {callbacks: [{class_path: torch.hub.load, init_args: {repo_or_dir: evil}}]}"),
}


def fit(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "evmamba.launch.cli", "fit", "--config", "recipe.yaml", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Module: pass\ndef net(): pass\n")
    (tmp_path / "other.yaml").write_text("class_path: evil.Module\n")
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_runs_no_module_of_a_stranger(folder: Path, way: str):
    model, more = WAYS[way]
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, more=more))
    done = fit(folder, "--trainer.fast_dev_run=true")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "ran").exists()


def test_a_module_that_the_user_names_may_be_in_the_recipe(folder: Path):
    (folder / "recipe.yaml").write_text(RECIPE.format(model="{class_path: evil.Module}", more=""))
    done = fit(folder, "--import", "evil")
    assert (folder / "ran").exists()
    assert "does not correspond to a subclass of TaskModule" in done.stderr
