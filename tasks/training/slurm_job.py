"""What SLURM tells a process about the job it runs in, and what it can be asked there.

All that a run knows of its scheduler: for another one, write these functions again, and `evmamba.launch.cluster.slurm`,
which submits jobs and asks for them from outside.
"""

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from evmamba.errors import UserError

log = logging.getLogger("lightning.pytorch.utilities.rank_zero")

# In such jobs somebody types the commands; Lightning starts the processes then.
INTERACTIVE_JOBS = ("bash", "interactive")
COMMAND_SECONDS = 30
# Variable: by which file a process asks the job's script to queue the job again.
REQUEUE_FILE = "EVMAMBA_REQUEUE_FILE"


@dataclass(frozen=True)
class Step:
    """Processes that one ``srun`` started.

    Attributes:
        nodes: number of machines.
        per_node: processes on each.
        hosts: the machines in SLURM's words, e.g. ``n[1-2]``.
    """

    nodes: int
    per_node: int
    hosts: str


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """The number of this job; None outside of one."""
    return environment.get("SLURM_JOB_ID")


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often this job was requeued."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


def node(environment: Mapping[str, str] = os.environ) -> str | None:
    """This machine as SLURM calls it; None outside of a job."""
    return environment.get("SLURMD_NODENAME")


def rank(environment: Mapping[str, str] = os.environ) -> str | None:
    """Number of this process among those of its step; None outside of one."""
    return environment.get("SLURM_PROCID") if in_step(environment) else None


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ``srun`` started this process, and Lightning will go by that."""
    return "SLURM_STEP_ID" in environment and environment.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS


def step(environment: Mapping[str, str] = os.environ) -> Step | None:
    """The processes that were started with this one; None if it was started alone, and may start others.

    Raises:
        UserError: a job on several nodes whose command was started once, without srun; srun in an interactive job;
            unequal numbers of processes on the nodes.
    """
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS:
        processes = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
        if processes > 1 and "SLURM_PTY_PORT" not in environment:
            raise UserError(
                f"each of these {processes} processes of an interactive job would train alone, as Lightning goes by "
                "the job's name; give the step another: srun --job-name=evmamba ..."
            )
        return None
    if in_step(environment):
        # As 2(x4), or as 2(x3),1 when the nodes have unequal numbers.
        tasks = environment["SLURM_STEP_TASKS_PER_NODE"]
        equal = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
        if equal is None:
            raise UserError(f"srun started {tasks} tasks on the nodes; every node needs as many (--ntasks-per-node)")
        return Step(int(environment["SLURM_STEP_NUM_NODES"]), int(equal[1]), environment["SLURM_STEP_NODELIST"])
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes > 1 and int(environment.get("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            f"this job has {nodes} nodes, but the command runs once, on the first of them: put srun before it "
            "(srun evmamba fit ...), or srun --nodes=1 --ntasks=1 for a single process"
        )
    return None


def port(environment: Mapping[str, str] = os.environ) -> int:
    """Where rank 0 of this step listens: below the ports that systems give away by themselves (32768 and above).

    Steps of a job differ, and so do jobs unless their numbers are thousands apart: on a node that jobs share,
    Lightning's 15000 + the job number's last four digits is also the next step's.
    """
    return 10000 + (101 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % 22751


def describe_to_lightning(step: Step | None, environment: MutableMapping[str, str] = os.environ) -> None:
    """Mend the variables that Lightning reads: they describe the job, of which the step may be a part.

    Without a step, in a job's script that does not use srun, it would take every one of them for srun's.
    """
    if step is None:
        environment.pop("SLURM_NTASKS", None)
    else:
        environment["SLURM_NTASKS_PER_NODE"] = str(step.per_node)


def is_preempted() -> bool:
    """Whether SLURM has given this job a time of grace before it makes room for another.

    Only at the end of that time would SLURM requeue it; a job that leaves before has failed in its eyes. Where scontrol
    is missing, nobody knows here, and the job's script looks before it does what `requeue` asks of it.
    """
    job = job_id()
    if job is None:
        return False
    try:
        said = _scontrol("show", "job", "--oneliner", job).stdout
    except FileNotFoundError:
        return REQUEUE_FILE in os.environ
    except (OSError, subprocess.TimeoutExpired):
        return False
    words = dict(word.split("=", 1) for word in said.split() if "=" in word)
    # After scancel it is COMPLETING; requeued without grace it is PENDING.
    return words.get("JobState") == "RUNNING" and words.get("PreemptTime", "None") != "None"


def requeue() -> bool:
    """Ask SLURM to queue this job (of an array: this task) again; return whether it said yes.

    Where scontrol is missing, as in many containers, the job's script is asked, by a file.

    False outside SLURM, and where the cluster does not allow it (``#SBATCH --requeue`` does); then a warning says so.
    """
    job = job_id()
    if job is None:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = _scontrol("requeue", job)
    except (OSError, subprocess.TimeoutExpired) as error:
        if isinstance(error, FileNotFoundError) and (file := os.environ.get(REQUEUE_FILE)):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).touch()
            return True
        log.warning(f"scontrol requeue {job}: {error}")
        return False
    if done.returncode:
        log.warning(f"scontrol requeue {job}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.returncode == 0


def has_scontrol() -> bool:
    """Whether a process can speak to SLURM here; in many containers it cannot."""
    return shutil.which("scontrol") is not None


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS)
