"""What a cluster wants to know of a job: options of `evmamba submit`, or a YAML file, or both.

    # cluster.yaml: every key is an option too (--account ..., --gpus-per-node ...); options win
    account: my-project
    partition: gpu
    time: 24:00:00
    nodes: 1
    gpus_per_node: 8
    cpus_per_task: 12
    mem: 0
    environment:
      - module load cuda
      - source /scratch/me/venv/bin/activate
    runs:                     # for one kind of run: cost, a task, evaluation, report
      classification: {nodes: 2, time: 48:00:00}

A cost run measures one device with nobody beside it, an evaluation stays on one node, a report needs no GPU, unless
`runs` says otherwise.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evmamba.errors import UserError, unknown_name
from evmamba.launch.store.results import COST
from evmamba.launch.store.spec import Resources
from evmamba.tasks import TASKS
from evmamba.tasks.plain_files import read_yaml

# SLURM's: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
TIME = re.compile(r"^(\d{1,9}(:\d\d?){0,2}|\d{1,6}-\d{1,6}(:\d\d?){0,2}|UNLIMITED)$")
# When the signal comes before the time limit, where nothing else is said; SLURM may send it a minute early.
WARNING_SECONDS = 90
EARLY_SECONDS = 60
# A run that is warned before it has begun to train has nothing to save.
START_SECONDS = 60
# Least values of whole numbers.
LEAST = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "warning": 1, "chain": 1, "array": 1}


@dataclass(frozen=True)
class JobConfig:
    """What one kind of job asks for.

    Attributes:
        account: to charge; None, here and below: the cluster's default.
        partition: or several, with commas.
        qos: quality of service.
        time: limit, as SLURM writes it (a number alone is minutes).
        nodes: number of nodes.
        gpus_per_node: 0 for a cluster without GPUs.
        gres: the GPUs in the cluster's own words, e.g. "gpu:a100:8", where ``--gpus-per-node`` is not understood.
        tasks_per_node: processes per node; None: one per GPU, or one without GPUs.
        cpus_per_task: cores for each, loading processes included.
        mem: memory per node, e.g. "200G"; "0" is all of it.
        strategy: Lightning's or ours, e.g. "ddp", "deepspeed_stage_1".
        interface: network interface of the rendezvous and of gloo and NCCL, e.g. "ib0"; None: they find one.
        exclusive: whether nobody else's job may be on its nodes.
        gpus_per_task: 1 asks for a GPU per process (``--gpus-per-task``) where a site wants that in place of
            ``--gpus-per-node``. Every process still sees its node's GPUs and takes the one of its local rank, so that
            NCCL reaches the others directly.
        numa: whether every process keeps to cores and memory of its own, in blocks of neighbours, as GPUs are numbered.
        container: command before python, e.g. "apptainer exec --nv evmamba.sif".
        apptainer: image for Apptainer (or Singularity); the command is made of it.
        pyxis: image for NVIDIA's pyxis, which adds ``--container-image`` to srun.
        mounts: folders that the image sees under the same paths, or as "/here:/there"; that of the run always is.
        python: the interpreter; None: the one that submits (without container), or "python" in a container.
        environment: shell lines before the run: modules, a virtual environment, variables.
        sbatch: more options, e.g. "--constraint=a100", "--reservation=night".
        srun: more options of the command that starts the processes, e.g. "--cpu-bind=cores".
        chain: jobs for each training, where requeueing is forbidden: the next one starts if the one before did not end
            well, and goes on from its checkpoint.
        array: trainings that differ by their seed are one array job, of which so many tasks run at once; None: a job
            each.
        warning: seconds before the time limit at which SLURM's signal comes; None: `WARNING_SECONDS`, or more where
            the run's own checkpoints take long.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1
    gres: str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    strategy: str | None = None
    interface: str | None = None
    exclusive: bool = False
    gpus_per_task: int | None = None
    numa: bool = False
    container: str | None = None
    apptainer: str | None = None
    pyxis: str | None = None
    mounts: tuple[str, ...] = ()
    python: str | None = None
    environment: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    chain: int = 1
    array: int | None = None
    warning: int | None = None

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        if self.time is not None and not TIME.match(self.time):
            raise UserError(f"time '{self.time[:60]}' is none of SLURM's forms; write e.g. 24:00:00 or 2-00:00:00")
        for program, example in (("sbatch", "--constraint=a100"), ("srun", "--cpu-bind=cores")):
            for line in getattr(self, program):
                if not line.startswith("-"):
                    raise UserError(f"{program} option '{line}' must start with a dash, e.g. {example}")
        if self.gpus_per_task not in (None, 1):
            raise UserError(f"gpus_per_task must be 1, a process's own, not {self.gpus_per_task}")
        if len(images := [key for key in ("container", "apptainer", "pyxis") if getattr(self, key)]) > 1:
            raise UserError(f"{' and '.join(images)} are two ways into a container; choose one")

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def resources(self) -> Resources:
        return Resources(nodes=self.nodes, devices=self.tasks, strategy=self.strategy)


MAX_JOBS = "max_jobs"
LEAST_JOBS = 3
INTEGERS = (*LEAST, "gpus_per_task", MAX_JOBS)
SWITCHES_OF = ("exclusive", "numa")
SWITCHES = {"true": True, "yes": True, "false": False, "no": False}
LISTS = ("environment", "sbatch", "srun", "mounts")
KEYS = tuple(field.name for field in dataclasses.fields(JobConfig))


def kinds() -> tuple[str, ...]:
    """The kinds of runs that may have settings of their own."""
    return (COST, *TASKS, "evaluation", "report")


# What a kind of run is without a word about it; what it leaves open comes from the general settings. A measurement has
# a node to itself, whose memory it does not need. Sites' options for GPU nodes do not fit a report.
NATURE: dict[str, dict[str, Any]] = {
    "cost": {"nodes": 1, "tasks_per_node": 1, "strategy": None, "exclusive": "true", "mem": None, "chain": 1},
    "evaluation": {"nodes": 1, "strategy": None, "chain": 1},
    "report": {
        "nodes": 1,
        "tasks_per_node": 1,
        "gpus_per_node": 0,
        "gpus_per_task": None,
        "gres": None,
        "mem": None,
        "cpus_per_task": None,
        "exclusive": "false",
        "numa": "false",
        "sbatch": None,
        "srun": None,
        "chain": 1,
    },
}
# What these kinds of runs need at most, also where others may take days.
SHORT = {"cost": "4:00:00", "report": "30:00"}


@dataclass(frozen=True)
class Cluster:
    """The settings of every kind of run.

    Attributes:
        jobs: kind -> what it asks for.
        given: what it was made from, to be stored and to be changed later: the keys, and under "runs" those of a kind.
        max_jobs: jobs of a benchmark that may be queued or running at once (a site's MaxSubmitJobs, say); None: all.
    """

    jobs: Mapping[str, JobConfig]
    given: Mapping[str, Any]
    max_jobs: int | None = None

    def __getitem__(self, kind: str) -> JobConfig:
        return self.jobs[kind]

    def resources(self, kind: str) -> Resources:
        return self.jobs[kind].resources


def read_cluster(
    file: Path | None, options: Mapping[str, Sequence[str]], before: Mapping[str, Any] | None = None
) -> Cluster:
    """Settings from a YAML file and from the command line, which wins.

    Args:
        file: see the head of this module; None for none.
        options: key -> values as given: ``VALUE`` for all kinds of runs, ``KIND=VALUE`` for one.
        before: `Cluster.given` of an earlier call, on which file and options are laid.

    Raises:
        UserError: the file is missing or no mapping; unknown keys (the nearest is offered); values that cannot be.
    """
    given = _merged(before or {}, _from_file(file) if file else {})
    try:
        return _cluster(_merged(given, _from_options(options, given)))
    except UserError as error:
        raise UserError(f"{error} (--cluster {file}, and the options beside it)" if file else str(error)) from error


def _cluster(given: Mapping[str, Any]) -> Cluster:
    special = given.get("runs", {})
    general = {key: value for key, value in given.items() if key not in ("runs", MAX_JOBS)}
    max_jobs = _typed(MAX_JOBS, given.get(MAX_JOBS))
    if max_jobs is not None and max_jobs < LEAST_JOBS:
        raise UserError(f"{MAX_JOBS} must be at least {LEAST_JOBS}: a run, and what submits the next one after it")
    jobs = {}
    for kind in kinds():
        settings = general | _nature(kind, general) | special.get(kind, {})
        typed = {key: _typed(key, value) for key, value in settings.items()}
        jobs[kind] = JobConfig(**{key: value for key, value in typed.items() if value is not None})  # null: the default
        if settings.get("gres") and not (settings.get("gpus_per_node") or settings.get("tasks_per_node")):
            raise UserError(
                f"gres '{settings['gres']}' does not say how many processes to start: add gpus_per_node, one process "
                "each, or tasks_per_node"
            )
        if kind in TASKS:
            _check_time(kind, jobs[kind])
    return Cluster(jobs, given, max_jobs)


def seconds(time: str | None) -> float:
    """A time limit in seconds; infinite where there is none.

    Args:
        time: as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].
    """
    if time is None or not TIME.match(time) or time == "UNLIMITED":
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def warned_in_time(job: JobConfig, kind: str, saving: float | None) -> JobConfig:
    """The same job with a warning that leaves time to save, if it is known how long that takes and nothing was given.

    Three times as long as the last checkpoint took, and a minute in which the step before it ends.

    Args:
        job: of a training.
        kind: of run, for messages.
        saving: seconds; None where no checkpoint was measured.

    Raises:
        UserError: the time limit leaves no time for a start besides.
    """
    if saving is None or job.warning is not None:
        return job
    job = dataclasses.replace(job, warning=max(WARNING_SECONDS, 60 + math.ceil(3 * saving)))
    _check_time(kind, job)
    return job


def _check_time(kind: str, job: JobConfig) -> None:
    warning = job.warning or WARNING_SECONDS
    least = warning + EARLY_SECONDS + START_SECONDS
    if seconds(job.time) < least:
        raise UserError(
            f"time {job.time} of {kind} is too short: the warning comes {warning} s before its end, up to "
            f"{EARLY_SECONDS} s earlier if SLURM wants, and a start takes {START_SECONDS} s; give at least "
            f"{math.ceil(least / 60)} minutes"
        )


def _merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    runs = {kind: dict(settings) for kind, settings in first.get("runs", {}).items()}
    for kind, settings in then.get("runs", {}).items():
        runs[kind] = runs.get(kind, {}) | settings
    return {**first, **then} | ({"runs": runs} if runs else {})


def _from_options(options: Mapping[str, Sequence[str]], before: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping as a file's. Lines (environment, sbatch) are added to those that are there."""
    found: dict[str, Any] = {"runs": {}}
    for key, values in options.items():
        for value in values:
            kind, _, rest = value.partition("=")
            target, source, text = found, before, value
            if kind in kinds():
                target, text = found["runs"].setdefault(kind, {}), rest
                source = before.get("runs", {}).get(kind, {})
            target[key] = [*_lines(target.get(key, source.get(key))), text] if key in LISTS else text
    return found


def _lines(value: Any) -> list[str]:
    return list(_typed("environment", value))


def _nature(kind: str, general: Mapping[str, Any]) -> dict[str, Any]:
    nature = {**(TASKS[kind].cluster if kind in TASKS else {}), **NATURE.get(kind, {})}
    if kind in SHORT:
        nature["time"] = min(SHORT[kind], str(general.get("time") or "UNLIMITED"), key=seconds)
    # One device: of a request in the cluster's own words only the number is changed.
    if kind == "cost" and _typed("gpus_per_node", general.get("gpus_per_node", 1)) != 0:
        nature["gpus_per_node"] = 1
        if gres := general.get("gres"):
            nature["gres"] = re.sub(r":\d+$", ":1", gres)
    return nature


def _from_file(file: Path) -> dict[str, Any]:
    document = read_yaml(file, as_texts=True)
    if not isinstance(document, dict):
        raise UserError(f"{file}: a cluster file holds lines like 'partition: gpu'")
    runs = document.get("runs", {})
    if not isinstance(runs, dict) or not all(isinstance(settings, dict) for settings in runs.values()):
        raise UserError(f"{file}: 'runs' holds settings by kind of run, e.g. 'detection: {{nodes: 2}}'")
    for kind in runs:
        if kind not in kinds():
            raise unknown_name(f"kind of run in {file}", kind, kinds())
    for settings in (document, *runs.values()):
        for key in settings:
            if key not in KEYS and not (key in ("runs", MAX_JOBS) and settings is document):
                raise unknown_name(f"key in {file}", key, (*KEYS, "runs", MAX_JOBS))
    return document


def _typed(key: str, value: Any) -> Any:
    if value is None or value in ("", "null"):
        return () if key in LISTS else False if key in SWITCHES_OF else None
    if key in SWITCHES_OF:
        if str(value).lower() not in SWITCHES:
            raise UserError(f"{key} is true or false, not '{str(value)[:60]}'")
        return SWITCHES[str(value).lower()]
    if key in LISTS:
        lines = value.splitlines() if isinstance(value, str) else value
        return tuple(str(line) for line in lines)
    if not isinstance(value, str | int):
        raise UserError(f"{key} is one value, not {str(value)[:60]}")
    if key in INTEGERS:
        try:
            return int(value)
        except ValueError:
            raise UserError(f"{key} must be a whole number, not '{str(value)[:60]}'") from None
    return str(value)
