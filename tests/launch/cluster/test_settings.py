"""What a cluster is asked for: options, a file, and what is stored."""

import math
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.cluster.settings import Cluster, kinds, read_cluster, seconds


def made(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return file


def test_a_cluster_file_says_everything_and_options_win(tmp_path: Path):
    file = made(
        tmp_path,
        "partition: gpu\ntime: 24:00:00\ngpus_per_node: 8\nnodes: 2\nenvironment: [module load cuda]\n"
        "runs:\n  detection: {nodes: 1, time: 0:30:00}\n  cost: {partition: small}\n",
    )
    cluster = read_cluster(file, {"partition": ["long"], "nodes": ["classification=4"], "environment": ["export A=1"]})
    assert [cluster[kind].partition for kind in kinds()] == ["small", "long", "long", "long", "long", "long"]
    assert [cluster[kind].nodes for kind in kinds()] == [1, 4, 1, 2, 1, 1]
    assert [cluster[kind].tasks for kind in kinds()] == [1, 8, 8, 8, 8, 1]
    assert [cluster[kind].gpus_per_node for kind in kinds()] == [1, 8, 8, 8, 8, 0]
    assert cluster["classification"].time == "24:00:00"  # not YAML's 86400 seconds
    assert cluster["detection"].time == "0:30:00"
    assert cluster["detection"].environment == ("module load cuda", "export A=1")


def test_settings_that_were_stored_are_changed_by_new_ones(tmp_path: Path):
    file = made(tmp_path, "partition: gpu\nruns:\n  detection: {nodes: 2}\n")
    before = read_cluster(file, {"time": ["10:00"]}).given
    now: Cluster = read_cluster(None, {"time": ["detection=20:00"], "qos": ["high"]}, before)
    assert (now["detection"].nodes, now["detection"].time, now["segmentation"].time) == (2, "20:00", "10:00")
    assert {now[kind].partition for kind in kinds()} == {"gpu"}
    assert {now[kind].qos for kind in kinds()} == {"high"}


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("90:30", 5430), ("1:00:30", 3630), ("2-3", 183600), ("1-00:30", 88200), ("UNLIMITED", math.inf)],
)
def test_a_time_limit_is_understood_as_slurm_does(time: str, expected: float):
    assert seconds(time) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gpu_per_node: 8", "unknown key in .*did you mean gpus_per_node"),
        ("runs: {detektion: {nodes: 1}}", "unknown kind of run in .*did you mean detection"),
        ("nodes: two", "nodes must be a whole number, not 'two'"),
        ("nodes: 0", "nodes must be at least 1"),
        ("time: one day", "time 'one day' is none of SLURM's forms"),
        ("nodes: [1, 2]", "nodes is one value"),
        ("sbatch: [constraint=a100]", "sbatch option 'constraint=a100' must start with a dash"),
        ("srun: [label]", "srun option 'label' must start with a dash"),
        ("gres: gpu:a100:8", "gres 'gpu:a100:8' does not say how many processes to start: add gpus_per_node"),
        ("exclusive: perhaps", "exclusive is true or false, not 'perhaps'"),
        ("apptainer: a.sif\npyxis: a.sqsh", "apptainer and pyxis are two ways into a container"),
        ("gpus_per_task: 2", "gpus_per_task must be 1"),
        ("time: 3:00", "time 3:00 of classification is too short: the warning comes 90 s .*give at least 4 minutes"),
        ("time: 10:00\nwarning: 600", "too short.*give at least 12 minutes"),
        ("- nodes", "a cluster file holds lines like"),
        ("nodes: {", "no valid YAML"),
    ],
)
def test_a_wrong_cluster_file_is_told_in_one_line(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(UserError, match=complaint) as raised:
        read_cluster(made(tmp_path, text), {})
    assert "\n" not in str(raised.value)
