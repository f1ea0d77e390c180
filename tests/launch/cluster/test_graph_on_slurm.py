"""`evmamba submit` on two nodes: all jobs of a benchmark in their order, from pretraining to the table."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ..tiny import EVMAMBA, TASKS, free_port, run, write_images
from .slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KINDS = ("cost", "classification", "detection", "segmentation_training", "segmentation_evaluation")
SETTINGS = [
    "trainer.max_steps=2",
    *(f"{task}.data.init_args.batch_size=2" for task in TASKS),
    "classification.data.init_args.image_size=32",
    "detection.model.init_args.channels=16",
    "segmentation.data.init_args.crop_size=32",
]


@pytest.fixture
def submission(tmp_path: Path) -> list[str]:
    """A command that submits all three tasks on a few images, the classification on two nodes."""
    command = [*map(str, EVMAMBA), "submit", "--preset=tiny", "--backbones=resnet10t", f"--output={tmp_path / 'bench'}"]
    for task in TASKS:
        write_images(task, tmp_path / task)
        command.append(f"--{task}={tmp_path / task}")
    meet = f"export GLOO_SOCKET_IFNAME=lo MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()} OMP_NUM_THREADS=1"
    command += ["--gpus-per-node=0", "--nodes=classification=2", f"--environment={meet}"]
    return command + [f"--set={setting}" for setting in SETTINGS]


def kind(name: str) -> str:
    """What kind of run a run's name stands for."""
    return name.split("-")[0]


def states(cluster: Cluster, output: Path) -> dict[str, dict[str, Any]]:
    """What `evmamba status` says, by the kind of run."""
    done = run([*EVMAMBA, "status", output, "--json"], environment=cluster.environment())
    assert done.returncode == 0, done.stderr
    return {kind(state["run"]): state for state in json.loads(done.stdout)}


def logs(output: Path) -> str:
    return "\n".join(f"== {log}\n{log.read_text()[-2000:]}" for log in output.rglob("*.log"))


def submit(cluster: Cluster, command: list[str], output: Path) -> dict[str, str]:
    """Submit; return the numbers of all jobs by the kind of run, when the last of them has ended."""
    done = run(command, environment=cluster.environment())
    assert done.returncode == 0, done.stderr
    jobs = {name: str(state["job"]) for name, state in states(cluster, output).items()}
    cluster.wait_for(jobs["report"], lambda job: job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 400)
    return jobs


def test_a_benchmark_ends_in_its_table_with_the_failed_run_which_resume_completes(
    cluster: Cluster, submission: list[str], tmp_path: Path
):
    output = tmp_path / "bench"
    broken = tmp_path / "segmentation" / "images" / "training" / "03.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))

    first = submit(cluster, submission, output)
    assert set(first) == {*KINDS, "report"}
    after = states(cluster, output)
    assert {name for name in after if after[name]["state"] == "finished"} == {
        "cost",
        "classification",
        "detection",
        "report",
    }, logs(output)
    assert "03.png" in after["segmentation_training"]["said"]
    assert "03.png" in (output / "report.md").read_text()

    broken.write_bytes(whole)
    second = submit(cluster, [*map(str, EVMAMBA), "submit", "--resume", f"--output={output}"], output)
    assert {name for name in second if second[name] != first[name]} == {
        "segmentation_training",
        "segmentation_evaluation",
        "report",
    }
    assert {state["state"] for state in states(cluster, output).values()} == {"finished"}, logs(output)

    jobs = {name: cluster.job(number) for name, number in second.items()}
    assert {job["JobState"] for job in jobs.values()} == {"COMPLETED"}
    assert jobs["classification"]["NodeList"] == "n[1-2]"
    for later, earlier in (
        ("detection", "classification"),
        ("segmentation_evaluation", "segmentation_training"),
        ("report", "segmentation_evaluation"),
    ):
        assert jobs[later]["StartTime"] >= jobs[earlier]["EndTime"], (later, earlier)  # ISO dates sort as text

    results = {kind(path.parent.name): json.loads(path.read_text()) for path in output.rglob("result.json")}
    assert results["classification"]["provenance"]["nodes"] == 2
    assert results["classification"]["provenance"]["processes"] == 2
    for name in ("detection", "segmentation_training"):
        assert results[name]["provenance"]["init_from"] == results["classification"]["run"]
    (row,) = csv.DictReader((output / "report.csv").open(encoding="utf-8"))
    for column, name, metric in (
        ("classification: top-1 (%)", "classification", "top1"),
        ("segmentation · UPerNet: mIoU (%)", "segmentation_evaluation", "mIoU"),
    ):
        assert row[column].split()[0] == f"{100 * results[name]['metrics'][metric]:.1f}"  # its interval follows
