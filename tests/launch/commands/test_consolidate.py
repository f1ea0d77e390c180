"""`evmamba consolidate`; whole folders of real trainings are in tests/launch/fit/test_strategies_training.py."""

from pathlib import Path

import pytest

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("place", "why"), [("nothing.ckpt", "is no folder"), ("empty.ckpt", "is no sharded checkpoint")]
)
def test_what_is_no_sharded_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, why: str
):
    (tmp_path / "empty.ckpt").mkdir()
    assert cli.main(["consolidate", str(tmp_path / place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / place} {why}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty.ckpt"]
