"""`evmamba cluster`: what it says when it is called wrongly; the check is tested in `tests/launch/cluster`."""

import sys

import pytest

from evmamba.launch import cli


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "usage: evmamba cluster check"),
        (["--help"], 0, "a job of two minutes"),
        (["chek"], 2, "did you mean check"),
        (["check", "--nodes=0"], 2, "nodes must be at least 1"),
    ],
)
def test_a_wrong_call_says_what_there_is(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
):
    assert cli.main(["cluster", *arguments]) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_without_slurm_the_check_says_so(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "evmamba.launch.cluster.check_job", None)  # it needs a Linux, and is not imported
    monkeypatch.delitem(sys.modules, "evmamba.launch.cluster.check", raising=False)
    assert cli.main(["cluster", "check", f"--output={tmp_path / 'check'}"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
