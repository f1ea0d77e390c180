"""Chains and arrays of seeds on SLURM itself: what waits for what, what is cancelled, what each task writes."""

from pathlib import Path

import pytest

from evmamba.launch.cluster.jobs import JobBook
from evmamba.launch.cluster.queueing import Queue
from evmamba.launch.cluster.settings import read_cluster
from evmamba.launch.cluster.slurm import run_script
from evmamba.launch.store.spec import RUNS_FOLDER, Spec

from ..handmade import made_spec
from .slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
# In place of Python: each start of a run notes itself, and ends with the next status that lies in the run's folder.
RUN = """#!/bin/sh
cd "$(dirname "$3")"
echo started >> starts
status=$(sed -n "$(wc -l < starts)p" statuses)
echo "ended with $status"
exit "$status"
"""


@pytest.fixture
def put(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Submits runs, each with what its starts end with and the runs it needs; returns what became of their jobs."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment()[name])
    python = tmp_path / "python"
    python.write_text(RUN)
    python.chmod(0o755)

    def run(runs: list[tuple[Spec, str, list[str]]], **options: list[str]) -> dict[str, list[str]]:
        settings = read_cluster(None, {"gpus_per_node": ["0"], "python": [str(python)], **options})
        output = tmp_path / "out"
        for spec, statuses, _ in runs:
            folder = output / RUNS_FOLDER / spec.name
            spec.write(folder)
            (folder / "statuses").write_text(statuses)
            (folder / "job.sbatch").write_text(run_script(spec, folder, settings[spec.task]))
        jobs = {spec.name: settings[spec.task] for spec, _, _ in runs}
        queue = Queue(output, JobBook(output), jobs, None, {}, [(spec, needs) for spec, _, needs in runs])
        for spec, _, _ in runs:
            queue.put(spec)
        book = JobBook.read(output)
        return {
            spec.name: [
                cluster.wait_for(str(number), lambda job: job["JobState"] in ENDED, 90)["JobState"]
                for number in book.jobs_of(spec.name)
            ]
            for spec, _, _ in runs
        }

    return run


def test_a_chain_ends_with_the_first_job_that_ends_well_and_what_needs_it_starts_then(put, tmp_path: Path):
    stopped, straight = made_spec("classification", seed=1), made_spec("classification", seed=2)
    after = [made_spec("segmentation", seed=seed).after(first) for seed, first in ((1, stopped), (2, straight))]
    found = put(
        [
            (stopped, "75\n0\n", []),
            (straight, "0\n", []),
            (after[0], "0\n", [stopped.name]),
            (after[1], "0\n", [straight.name]),
        ],
        chain=["classification=3"],
    )
    assert found[stopped.name] == ["FAILED", "COMPLETED", "CANCELLED"]
    assert found[straight.name] == ["COMPLETED", "CANCELLED", "CANCELLED"]
    assert found[after[0].name] == found[after[1].name] == ["COMPLETED"]
    log = (tmp_path / "out" / RUNS_FOLDER / stopped.name / "run.log").read_text()
    assert [line for line in log.splitlines() if line.startswith("ended")] == ["ended with 75", "ended with 0"]


def test_every_seed_of_an_array_goes_after_its_own_and_writes_into_its_own_folder(put, tmp_path: Path):
    first = [made_spec("classification", seed=seed) for seed in (0, 3)]
    then = [made_spec("segmentation", seed=spec.seed).after(spec) for spec in first]
    runs = [(first[0], "0\n", []), (first[1], "1\n", [])]
    found = put([*runs, *((spec, "0\n", list(spec.needs)) for spec in then)], array=["2"])
    assert [found[spec.name] for spec in (*first, *then)] == [["COMPLETED"], ["FAILED"], ["COMPLETED"], ["CANCELLED"]]
    logs = [(tmp_path / "out" / RUNS_FOLDER / spec.name / "run.log").read_text() for spec in first]
    assert ["ended with 0" in log for log in logs] == [True, False]
    assert "ended with 1" in logs[1]
    assert not (tmp_path / "out" / RUNS_FOLDER / then[1].name / "starts").exists()
