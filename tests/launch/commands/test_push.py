"""`evmamba push`: what cannot be published is one line, and leaves nothing."""

from pathlib import Path

import pytest

from evmamba.launch import cli


def test_a_network_of_timm_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.main(["push", "resnet18", str(tmp_path / "folder")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a ResNet" in line
    assert not list(tmp_path.iterdir())
