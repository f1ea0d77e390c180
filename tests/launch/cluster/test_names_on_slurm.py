"""Names that a shell or SLURM would take for more pass through a job's script unharmed."""

import sys
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.cluster.settings import read_cluster
from evmamba.launch.cluster.slurm import report_script, run_script
from evmamba.launch.store.spec import LOG_FILE, SPEC_FILE

from ..handmade import made_spec
from .slurm_cluster import Cluster

NAMES = [
    "it's",
    'a "quoted" name',
    "two  words ",
    "$(touch ran)",
    "`touch ran`",
    "; touch ran; #",
    "-rf",
    "%j %%A",
    "$HOME ~ * ?",
    "é日本",
    "&& touch ran |",
]


@pytest.mark.cluster
@pytest.mark.slow
def test_names_reach_the_run_as_they_are(cluster: Cluster, tmp_path: Path):
    numbers = {}
    for name in NAMES:
        folder = tmp_path / name / "runs" / "run"
        folder.mkdir(parents=True)
        # In the interpreter's place: writes what it was called with, line by line, beside the run's folder.
        recorder = folder.parents[1] / "py thon"
        recorder.write_text(f'#!{sys.executable}\nimport sys\nprint("\\n".join(sys.argv[1:]))\n')
        recorder.chmod(0o755)
        job = read_cluster(None, {"gpus_per_node": ["0"], "python": [str(recorder)]})["cost"]
        script = folder / "job.sbatch"
        script.write_text(run_script(made_spec("cost"), folder, job))
        report = folder.parents[1] / "report.sbatch"
        report.write_text(report_script(folder.parents[1], read_cluster(None, {"python": [str(recorder)]})["report"]))
        numbers[name] = [cluster.run("sbatch", "--parsable", str(path)) for path in (script, report)]
    for name, (run, report) in numbers.items():
        folder = tmp_path / name / "runs" / "run"
        for number in (run, report):
            job = cluster.wait_for(number, lambda job: job["JobState"] in ("COMPLETED", "FAILED"), 150)
            assert job["JobState"] == "COMPLETED", name
        log = (folder / LOG_FILE).read_text()
        assert log == f"-m\nevmamba.launch.bench.run\n{folder / SPEC_FILE}\n", name
        told = (folder.parents[1] / "report.log").read_text()
        assert told.splitlines()[-1] == str(folder.parents[1]), name
    assert not list(Path.cwd().glob("ran")), "it ran what a name says"
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("name", ["a\ntouch ran\n", "\x1b[31m", "a\rb"])
def test_a_line_break_in_a_header_is_refused(tmp_path: Path, name: str):
    job = read_cluster(None, {})["cost"]
    with pytest.raises(UserError, match="line break"):
        run_script(made_spec("cost"), tmp_path / name, job)
    with pytest.raises(UserError, match="line break"):
        run_script(made_spec("cost"), tmp_path, read_cluster(None, {"sbatch": [f"--comment={name}"]})["cost"])


def test_a_backslash_in_a_logs_name_is_refused(tmp_path: Path):
    """SLURM takes it away, and the job fails without a word."""
    with pytest.raises(UserError, match="backslash"):
        run_script(made_spec("cost"), tmp_path / "a\\b", read_cluster(None, {})["cost"])
