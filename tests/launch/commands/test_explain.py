"""`evmamba explain`: mistakes are one line."""

import pytest

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("explain a.png", "name one network"),
        ("explain a.png --backbone resnet18 --checkpoint b.ckpt", "name one network"),
        ("explain a.png --backbone resnet18", "a.png: no such image"),
        ("explain a.png --backbone resnet18 --class ant", "unknown class 'ant'"),
        ("explain a.png --backbone resnet18 --class 1000", "the network has 1000 classes, counted from 0"),
        ("explain a.png --backbone deit_tiny_patch16_224", "no maps"),
    ],
)
def test_a_mistake_is_one_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
