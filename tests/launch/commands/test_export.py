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


@pytest.mark.parametrize(
    ("target", "size", "expected"),
    [
        ("net.onnx", "224", "write height x width"),
        ("net.onnx", "16x224", "from 32 pixels up"),
        ("net.safetensors", "224x224", "weights, which are for any size"),
    ],
)
def test_a_size_that_makes_no_sense_is_told(target: str, size: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["export", "efficientvmamba_t", "-o", target, "--fixed-size", size]) == 2
    assert expected in capsys.readouterr().err
