"""A recipe runs no code that the user has not named, whatever way it names it."""

from pathlib import Path

import pytest

from evmamba.launch.cli import main
from evmamba.tasks import trust

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


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two modules lie where the command is given; to import one leaves a file there."""
    for name in ("evil", "friend"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nclass Module: pass\ndef net(): pass\n")
    (tmp_path / "other.yaml").write_text("class_path: evil.Module\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_trusted", dict.fromkeys(trust.ALWAYS))
    monkeypatch.setenv("EVMAMBA_IMPORT", "")  # and have it gone again afterwards
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_runs_no_module_of_a_stranger(folder: Path, way: str, capsys: pytest.CaptureFixture):
    model, more = WAYS[way]
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, more=more))
    assert main(["fit", "--config", "recipe.yaml", "--trainer.fast_dev_run=true"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2  # Lightning's seed, the reason
    assert not (folder / "ran").exists()


def test_a_module_that_the_user_names_may_be_in_the_recipe(folder: Path, capsys: pytest.CaptureFixture):
    (folder / "recipe.yaml").write_text(RECIPE.format(model="{class_path: friend.Module}", more=""))
    assert main(["fit", "--config", "recipe.yaml", "--import", "friend"]) == 2
    assert (folder / "ran").exists()
    assert "does not correspond to a subclass of TaskModule" in capsys.readouterr().err
