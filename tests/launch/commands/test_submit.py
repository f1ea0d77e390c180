"""`evmamba submit`: its options, and its way out without SLURM."""

import shutil
from pathlib import Path

import pytest

from evmamba.launch import cli
from evmamba.launch.cluster.settings import KEYS, MAX_JOBS
from evmamba.launch.commands.shared import CLUSTER_OPTIONS


def test_without_slurm_the_other_ways_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(shutil.which("git") or "/usr/bin/git")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cli.main(["submit", f"--output={tmp_path}"]) == 2
    assert "there is no sbatch here" in (said := capsys.readouterr().err)
    assert "--dry-run" in said
    assert "--local" in said
    assert cli.main(["submit", f"--output={tmp_path}", "--resume"]) == 2
    assert "no sbatch" in capsys.readouterr().err


def test_every_key_of_a_cluster_file_is_an_option():
    assert set(CLUSTER_OPTIONS) == {*KEYS, MAX_JOBS}
