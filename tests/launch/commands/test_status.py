"""`evmamba status`: for people, for programs, and without waiting for torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evmamba.launch import cli

from ..cluster.chain import CHAIN, FIRST, finish, submitted
from ..cluster.fake_slurm import FakeSlurm, install


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return submitted(tmp_path / "out")


def test_json_is_for_programs(output: Path, fake: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    finish(output, FIRST)
    assert cli.main(["status", str(output), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["run"] for entry in document] == [spec.name for spec in CHAIN]
    assert document[0]["metrics"]["top1"] == 0.81337
    assert document[0]["state"] == "finished"


@pytest.mark.parametrize(("text", "complaint"), [("{", "no valid JSON"), ("{}", "not a list of jobs")])
def test_a_damaged_list_of_jobs_is_named(output: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]):
    (output / "jobs.json").write_text(text)
    assert cli.main(["status", str(output)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert str(output / "jobs.json") in error


def test_an_empty_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["status", str(tmp_path)]) == 2
    assert "no runs here" in capsys.readouterr().err


def test_status_does_not_wait_for_torch(output: Path, fake: FakeSlurm):
    fake.set(1, JobState="RUNNING", Reason="None", NodeList="n1", RunTime="00:01:03")
    finish(output, FIRST)
    program = (
        "import sys\n"
        "from evmamba.launch.cli import main\n"
        "assert main(['status', sys.argv[1]]) == 0\n"
        "print({'torch', 'timm', 'lightning'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", program, str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert FIRST.name[:20] in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
