"""`evmamba pull`: what is not there is one line, and leaves nothing."""

from pathlib import Path

import pytest

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("origin", "message"),
    [("./folder", "nothing was pushed there"), ("a/b/c", "'a/b/c' cannot be a repository of the hub")],
)
def test_an_origin_without_a_network_is_told(
    origin: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pull", origin, "-o", "a.safetensors"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())
