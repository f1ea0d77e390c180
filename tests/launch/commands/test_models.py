"""`evmamba models`."""

import pytest

from evmamba import list_models
from evmamba.launch import cli


def test_ours_come_alone_and_timms_by_pattern(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["models"]) == 0
    *ours, rest = capsys.readouterr().out.splitlines()
    assert ours == list_models()
    assert rest.startswith("and ")
    assert cli.main(["models", "resnet1?"]) == 0
    assert "resnet18" in capsys.readouterr().out.splitlines()


def test_a_pattern_without_a_match_offers_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["models", "efficientvmamba_x"]) == 2
    assert "did you mean efficientvmamba_" in capsys.readouterr().err
