"""Trainings start the same way whoever starts their processes, and end soon when one of the processes fails."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evmamba.launch.train
from evmamba.errors import UserError
from evmamba.launch.fit.launchers import Launch, find_launch, process_rank, set_topology

from ..misbehaviour import FAILED
from ..tiny import BIN, EVMAMBA, free_port, loopback, run, write_images, write_recipe

TRAIN_FILE = Path(evmamba.launch.train.__file__)
TORCHRUN = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "-m", "evmamba.launch.train"]
FABRIC = [BIN / "fabric", "run", "--accelerator=cpu", "--devices=2", "--strategy=ddp"]

STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost,n[2-7]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "launch", "rank"),
    [
        ({}, None, 0),
        ({"LOCAL_RANK": "1"}, None, 1),
        (STEP, Launch("srun", 2, 2, ("--nodes", "--ntasks-per-node")), 3),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_STEP_NUM_NODES": "1"}, ("srun", 1, 8), 3),
        (STEP | ELASTIC, ("torchrun", 2, 4), 5),
        (ELASTIC | {"LT_CLI_USED": "1"}, ("fabric run", 2, 4), 5),
        (STEP | {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "1"}, None, 0),
        (STEP | {"SLURM_JOB_NAME": "bash", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "1"}, None, 0),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None, 0),
    ],
    ids=[
        "python",
        "child",
        "srun",
        "one node",
        "torchrun in a job",
        "fabric",
        "interactive",
        "terminal",
        "job without srun",
    ],
)
def test_launcher_is_recognised(environment: dict[str, str], launch: Launch | tuple | None, rank: int):
    found = find_launch(environment)
    assert process_rank(environment) == rank
    assert (found if isinstance(launch, Launch | None) else (found.by, found.nodes, found.per_node)) == launch


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"},
            "this job has 2 nodes, but the command runs once.*put srun",
        ),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, r"srun started 2,1 tasks.*--ntasks-per-node"),
        (
            STEP | {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "4"},
            "each of these 4 processes.*srun --job-name=evmamba",
        ),
    ],
    ids=["srun forgotten", "unequal nodes", "srun in salloc"],
)
def test_a_start_that_would_hang_is_refused(environment: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        find_launch(environment)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Replaces the process's environment; all of it is back after the test."""

    def replace(variables: Mapping[str, str]) -> None:
        for name in [
            *STEP,
            *ELASTIC,
            "SLURM_NTASKS_PER_NODE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "LT_CLI_USED",
            "SLURM_JOB_NAME",
        ]:
            monkeypatch.setenv(name, "")  # so that monkeypatch knows it, whatever becomes of it
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return replace


def options(**given: object) -> SimpleNamespace:
    """A Trainer's options as LightningCLI's parser leaves them."""
    return SimpleNamespace(**{"devices": "auto", "num_nodes": 1, "accelerator": "auto", "strategy": "auto"} | given)


@pytest.mark.parametrize("devices", ["auto", -1, 2, "2", [0, 1], "0,1"])
def test_trainer_takes_the_number_of_processes_from_the_launcher(environment, devices):
    environment(STEP)
    trainer = options(devices=devices)
    set_topology(trainer)
    assert trainer.num_nodes == 2
    assert trainer.devices == (2 if devices in ("auto", -1) else devices)  # which GPUs is the user's choice
    # What Lightning goes by: the step, not the job.
    assert os.environ["MASTER_ADDR"] == "localhost"
    assert os.environ["SLURM_NTASKS_PER_NODE"] == "2"
    assert os.environ["MASTER_PORT"] == "11212"  # its job's and step's own


def test_a_port_of_the_environment_wins(environment):
    environment(STEP | {"MASTER_PORT": "12345"})
    set_topology(options())
    assert os.environ["MASTER_PORT"] == "12345"


@pytest.mark.parametrize(
    ("variables", "given", "message"),
    [
        (STEP, {"devices": 4}, r"trainer.devices=4, but srun started this with --ntasks-per-node=2"),
        (STEP, {"num_nodes": 4}, r"trainer.num_nodes=4, but srun started this with --nodes=2"),
        (ELASTIC, {"devices": 2}, r"trainer.devices=2, but torchrun started this with --nproc-per-node=4"),
        (STEP | {"MASTER_ADDR": "no.such.host.invalid"}, {}, r"MASTER_ADDR=no.such.host.invalid .* has no address"),
        (
            ELASTIC | {"LT_CLI_USED": "1", "LT_STRATEGY": "ddp"},
            {"strategy": "fsdp"},
            r"fabric run --strategy=ddp, but trainer.strategy=fsdp",
        ),
    ],
    ids=["devices", "nodes", "torchrun", "address", "fabric"],
)
def test_options_that_contradict_the_launcher_are_one_clear_line(environment, variables, given, message):
    environment(variables)
    with pytest.raises(UserError, match=message):
        set_topology(options(**given))


def test_job_without_srun_is_not_taken_for_one_with(environment):
    environment({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "3"})
    trainer = options(devices=4)
    set_topology(trainer)
    assert trainer.devices == 4
    assert "SLURM_NTASKS" not in os.environ  # by which Lightning would know srun


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_images("classification", folder / "data")
    return write_recipe("classification", folder / "data", folder / "recipe.yaml")


def start(
    launcher: list, command: str, recipe: Path, folder: Path, *arguments: str, threads: int = 1
) -> subprocess.CompletedProcess:
    """Run a training with everything it writes in `folder`."""
    devices = ["--trainer.devices=2"] if launcher is EVMAMBA else []
    if launcher is FABRIC:
        launcher = [*FABRIC, f"--main-port={free_port()}", TRAIN_FILE]
    options = [command, f"--config={recipe}", f"--trainer.default_root_dir={folder}", *devices, *arguments]
    return run([*launcher, *options], environment=loopback() | {"OMP_NUM_THREADS": str(threads)})


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training in two processes that Lightning started."""
    folder = tmp_path_factory.mktemp("trained")
    done = start(EVMAMBA, "fit", recipe, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return only_one(folder, "last.ckpt")


def only_one(folder: Path, name: str) -> Path:
    """The file of that name under a folder; two processes must not have written two."""
    found = list(folder.rglob(name))
    assert len(found) == 1, found
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, FABRIC], ids=["torchrun", "fabric run"])
def test_every_launcher_trains_the_same_network(launcher: list, recipe: Path, trained: Path, tmp_path: Path):
    done = start(launcher, "fit", recipe, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("config.yaml"))) == 1  # one process writes the log
    one, other = (torch.load(path, weights_only=False) for path in (trained, only_one(tmp_path, "last.ckpt")))
    assert one["global_step"] == other["global_step"] == 2
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.slow
def test_two_processes_write_one_result(recipe: Path, trained: Path, tmp_path: Path):
    done = start(TORCHRUN, "test", recipe, tmp_path, f"--ckpt_path={trained}", threads=2)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(only_one(tmp_path, "result.json").read_text())
    assert result["provenance"]["processes"] == 2
    assert result["provenance"]["threads"] == 2
    assert done.stdout.count("test/top1") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank", "how", "told"),
    [
        (EVMAMBA, 0, "error", "RuntimeError: this rank's own error"),
        (EVMAMBA, 1, "user_error", "evmamba: rank 1 on "),
        (TORCHRUN, 1, "error", "RuntimeError: this rank's own error"),
        (TORCHRUN, 1, "killed", "Signal 9 (SIGKILL) received"),
    ],
    ids=["lightning-0-error", "lightning-1-user_error", "torchrun-1-error", "torchrun-1-killed"],
)
def test_a_failing_process_is_heard_first_and_ends_the_others(
    launcher: list, rank: int, how: str, told: str, recipe: Path, tmp_path: Path
):
    name = "--trainer.callbacks"
    failure = [f"{name}+=misbehaviour.Misbehave", f"{name}.rank={rank}", f"{name}.how={how}"]
    done = start(launcher, "fit", recipe, tmp_path, "--trainer.max_steps=1000", *failure)
    assert time.time() - (tmp_path / FAILED).stat().st_mtime < 60
    assert done.returncode != 0
    assert told in done.stderr
    heard = [line for line in done.stderr.splitlines() if "Error: " in line or line.startswith("evmamba: ")]
    if how == "killed":
        assert "[rank0]: Traceback" not in done.stderr  # the other's lost connection is not the reason
    else:
        assert told in heard[0], heard
        assert done.stderr.count("this rank's own") == (2 if how == "error" else 1)  # a traceback cites its line


@pytest.mark.slow
def test_a_mistake_that_all_processes_share_is_told_once(recipe: Path, tmp_path: Path):
    done = start(TORCHRUN, "fit", recipe, tmp_path, "--trainer.max_epoch=2")
    assert done.returncode != 0
    assert done.stderr.count("evmamba: ") == 1
    assert "did you mean --trainer.max_epochs" in done.stderr
