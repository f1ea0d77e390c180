"""`evmamba export`: what is refused before a network is built."""

from pathlib import Path

import pytest

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("target", "expected"),
    [("net.onx", "did you mean .onnx"), ("net", "unknown file format"), ("none/net.onnx", "there is no folder")],
)
def test_a_target_that_cannot_be_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, expected: str
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "efficientvmamba_t", "-o", target]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
