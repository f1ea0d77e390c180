"""`evmamba verify`: what it is asked, before anything is loaded; what it finds is in test_verification.py."""

import pytest

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "say what to verify: NAME ..., --checkpoint FILE or --result FILE"),
        (["resnet18", "--result", "r.json"], "say what to verify"),
        (["resnet18", "--classification", "a", "--detection", "b"], "the folder of one task's data"),
        (["resnet18", "resnet50", "--classification", "a", "--published", "70"], "are of one network"),
        (["resnet18", "--clasification", "a"], "did you mean --classification"),
    ],
)
def test_contradictions_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", *arguments]) == 2
    assert complaint in capsys.readouterr().err
