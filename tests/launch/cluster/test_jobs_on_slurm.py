"""Trainings as jobs on two nodes: they train, they end soon when a part fails, they survive being interrupted."""

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from evmamba.launch.cluster.settings import read_cluster
from evmamba.launch.cluster.slurm import run_script
from evmamba.launch.fit.cli import settings_of
from evmamba.launch.store.results import read_result
from evmamba.launch.store.spec import TrainingSpec

from ..misbehaviour import FAILED
from ..tiny import BIN, EVMAMBA, TASKS, free_port, loopback, run, write_images, write_recipe
from .slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
# A start takes ten seconds on idle cores; these tests share theirs.
PATIENCE = 150
STOPPED = [
    ("trainer.max_steps", 4),
    ("trainer.callbacks+", "misbehaviour.Misbehave"),
    ("trainer.callbacks.rank", 0),
    ("trainer.callbacks.how", "time_limit"),
]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def submit(cluster: Cluster, folder: Path, recipe: Path, *arguments: str) -> str:
    """Submit a training on both nodes, one process on each; return the job's number."""
    script = folder / "job.sbatch"
    command = [*EVMAMBA, "fit", f"--config={recipe}", f"--trainer.default_root_dir={folder / 'run'}", *arguments]
    lines = [
        "#!/bin/bash",
        "#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append",
        f"#SBATCH --output={folder}/log",
        *(f"export {name}={value}" for name, value in loopback_variables().items()),
        f"srun --kill-on-bad-exit=1 {' '.join(map(str, command))}",
    ]
    script.write_text("\n".join(lines) + "\n")
    return cluster.run("sbatch", "--parsable", str(script))


def loopback_variables() -> dict[str, str]:
    names = ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "OMP_NUM_THREADS", "PYTHONPATH")
    # A port of its own: another cluster on this machine may have a job of this number.
    return {name: loopback()[name] for name in names} | {"MASTER_PORT": str(free_port())}


def misbehaving(rank: int, how: str) -> list[str]:
    name = "--trainer.callbacks"
    return [f"{name}+=misbehaviour.Misbehave", f"{name}.rank={rank}", f"{name}.how={how}"]


def ended(job: dict[str, str]) -> bool:
    return job["JobState"] in ENDED


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_images("classification", tmp_path / "data")
    return write_recipe("classification", tmp_path / "data", tmp_path / "recipe.yaml")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_on_two_nodes(cluster: Cluster, tmp_path: Path, task: str):
    write_images(task, tmp_path / "data")
    recipe = write_recipe(task, tmp_path / "data", tmp_path / "recipe.yaml")
    job = cluster.wait_for(submit(cluster, tmp_path, recipe), ended, PATIENCE)
    log = (tmp_path / "log").read_text()
    assert job["JobState"] == "COMPLETED", log[-3000:]
    assert job["NodeList"] == "n[1-2]"
    assert "Starting with 2 processes" in log
    (checkpoint,) = (tmp_path / "run").rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 2


@pytest.mark.parametrize("launcher", ["torchrun", "fabric run"])
def test_the_documented_scripts_of_other_launchers_train_on_two_nodes(
    cluster: Cluster, tmp_path: Path, recipe: Path, launcher: str
):
    document = (ROOT / "docs" / "cluster.md").read_text()
    (script,) = re.findall(rf"```bash\n(#!/bin/bash\n[^`]*?bash -c '{launcher} [^`]*)```", document)
    replaced = {
        " --gpus-per-node=8 --cpus-per-task=96": f"\n#SBATCH --output={tmp_path}/log",
        '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)': "127.0.0.1",  # names lead nowhere here
        "29500": str(free_port()),
        "--nproc-per-node=8": "--nproc-per-node=1",
        "--devices=8": "--devices=1",
        "--accelerator=cuda": "--accelerator=cpu",
        "classification/imagenet_efficientvmamba_t": f"{recipe} --trainer.default_root_dir={tmp_path / 'run'}",
        f"'{launcher}": f"'{BIN}/{launcher}",
        "launch/train.py": str(ROOT / "launch" / "train.py"),
    }
    for word, value in replaced.items():
        script = script.replace(word, value)
    variables = {name: value for name, value in loopback_variables().items() if not name.startswith("MASTER")}
    exports = "".join(f"export {name}={value}\n" for name, value in variables.items())
    (tmp_path / "job.sbatch").write_text(script.replace("export FIRST", f"{exports}export FIRST"))
    job = cluster.wait_for(cluster.run("sbatch", "--parsable", str(tmp_path / "job.sbatch")), ended, PATIENCE)
    log = (tmp_path / "log").read_text()
    assert job["JobState"] == "COMPLETED", log[-3000:]
    assert job["NodeList"] == "n[1-2]"
    assert "Starting with 2 processes" in log
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 2


@pytest.mark.parametrize("how", ["killed", "error"])
def test_a_failing_rank_ends_the_job_within_a_minute(cluster: Cluster, tmp_path: Path, recipe: Path, how: str):
    number = submit(cluster, tmp_path, recipe, "--trainer.max_steps=1000", *misbehaving(1, how))
    job = cluster.wait_for(number, ended, PATIENCE)
    assert time.time() - (tmp_path / "run" / FAILED).stat().st_mtime < 60
    log = (tmp_path / "log").read_text()
    assert job["JobState"] == "FAILED"
    tracebacks = [line for line in log.splitlines() if "Error: " in line]
    if how == "killed":
        assert "n2: task 1: Killed" in log
        assert not tracebacks  # the other's lost connection is not the reason
    else:
        assert tracebacks == ["[rank1]: RuntimeError: this rank's own error"]


def test_requeued_by_the_signal_before_the_time_limit_and_after_a_hang_it_ends_with_the_same_weights(
    cluster: Cluster, tmp_path: Path, recipe: Path
):
    arguments = ["--trainer.max_steps=6"]
    straight = [*EVMAMBA, "fit", f"--config={recipe}", f"--trainer.default_root_dir={tmp_path / 'straight'}"]
    done = run([*straight, *arguments, "--trainer.devices=2"])
    assert done.returncode == 0, done.stderr[-3000:]

    # SLURM sends it to the loading processes, too.
    arguments += ["--data.init_args.num_workers=1", "--timeout=40", *misbehaving(0, "time_limit")]
    number = submit(cluster, tmp_path, recipe, *arguments, *misbehaving(1, "stopped"))
    job = cluster.wait_for(number, ended, 4 * PATIENCE)
    log = (tmp_path / "log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), log[-3000:]
    assert log.count("evmamba: rank 1 on n2 gives no sign of life") == 1
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=False) for name in ("straight", "run")
    )
    assert one["global_step"] == other["global_step"] == 6
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_a_container_without_scontrol_and_a_clean_environment_lose_neither_variables_nor_the_requeue(
    cluster: Cluster, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
):
    """The training itself interrupts its first start, finds no scontrol, and its job's script queues it again."""
    monkeypatch.syspath_prepend(loopback()["PYTHONPATH"])  # the recipe names a class of misbehaviour.py
    spec = TrainingSpec(
        task="classification",
        model="resnet10t",
        seed=1,
        device="cpu",
        test=False,
        settings=settings_of(recipe, STOPPED),
    )
    folder, programs = tmp_path / "runs" / spec.name, tmp_path / "programs"
    programs.mkdir()
    (programs / "scancel").symlink_to(shutil.which("scancel", path=cluster.environment()["PATH"]))
    settings = read_cluster(
        None,
        {
            "gpus_per_node": ["0"],
            "container": [f"env PATH={programs}"],
            "python": [sys.executable],
            "sbatch": ["--export=NONE"],
            "environment": [f"export {name}={value}" for name, value in loopback_variables().items()]
            + [f"export SLURM_CONF={cluster.configuration} EVMAMBA_IMPORT=misbehaviour"],
        },
    )
    spec.write(folder)
    script = folder / "job.sbatch"
    script.write_text(run_script(spec, folder, settings["classification"]))
    number = cluster.run("sbatch", "--parsable", str(script))
    job = cluster.wait_for(number, ended, 2 * PATIENCE)
    log = (folder / "run.log").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log[-3000:]
    assert re.search(r"stopped by SIGUSR1 at step \d+; saved as .*last.ckpt; the job is queued again", log)
    assert re.search(r"continuing the training in .* from last.ckpt, step \d+", log)
    assert read_result(folder / "result.json").finished


def test_a_job_whose_node_dies_is_requeued_and_goes_on(cluster: Cluster, tmp_path: Path, recipe: Path):
    number = submit(cluster, tmp_path, recipe, "--trainer.max_steps=1000", *misbehaving(0, "slow"))
    step = tmp_path / "run" / FAILED  # touched in every step
    cluster.wait_for(number, lambda job: step.exists(), PATIENCE)
    cluster.kill_node("n2")
    try:
        job = cluster.wait_for(number, lambda job: job["Restarts"] == "1", PATIENCE)
        assert job["JobState"] in ("PENDING", "COMPLETING", "REQUEUED")
        assert "down" in cluster.states()["n2"]
        assert "DUE TO NODE FAILURE" in (tmp_path / "log").read_text()
    finally:
        cluster.start_node("n2")
    cluster.wait_for(number, lambda job: job["JobState"] == "RUNNING", PATIENCE)
    started = time.time()
    cluster.wait_for(number, lambda job: step.stat().st_mtime > started, PATIENCE)
    cluster.run("scancel", number)
    cluster.wait_for(number, ended, 60)
    found = re.search(r"continuing the training in .* from last.ckpt, step (\d+)", (tmp_path / "log").read_text())
    assert found
    assert int(found[1]) > 0
