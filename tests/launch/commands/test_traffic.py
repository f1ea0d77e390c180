"""`evmamba traffic`."""

import pytest

from evmamba.launch import cli

pytest.importorskip("triton")


def test_a_peer_has_a_row_a_step_and_its_largest_operators(capsys: pytest.CaptureFixture[str]):
    arguments = ["--backbones", "resnet18", "--batch-size", "2", "--resolution", "64", "--operators", "1"]
    assert cli.main(["traffic", *arguments]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "resnet18, batch 2, 64x64, bf16-mixed"
    assert header.split()[0] == "step"
    assert [row.split()[0] for row in rows] == ["inference", "_to_copy", "training", "_to_copy"]


def test_an_unknown_precision_is_said(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["traffic", "--precision", "fp4"]) == 2
    assert "fp4" in capsys.readouterr().err
