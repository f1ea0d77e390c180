"""SLURM: job scripts from the templates that people can use by hand, submitting them, and asking what became of them.

Only sbatch, squeue, scontrol, sacct and scancel are called, by name, with a time limit. sacct is a bonus: many clusters
and all small ones run without accounting, and then squeue and scontrol remember a job for some minutes after its end.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evmamba.errors import UserError, printable
from evmamba.launch.cluster.settings import WARNING_SECONDS, JobConfig
from evmamba.launch.store.spec import LOG_FILE, SPEC_FILE, Spec
from evmamba.tasks.registry import IMPORTS_VARIABLE

TEMPLATES = Path(__file__).parent / "scripts"
SCRIPT_FILE = "job.sbatch"
SETTINGS = ("# Settings\n", "# End of settings\n")
COMMAND_SECONDS = 60
# Variables of SLURM that describe no job.
OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS")
# A job's number; of a task of an array the array's and its own, "4711_3".
JobId = int | str
# States in which a job may still come to something.
LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
        "REQUEUE_FED", "SPECIAL_EXIT", "STAGE_OUT", "SIGNALING", "STOPPED"}  # fmt: skip


def run_script(spec: Spec, folder: Path, job: JobConfig) -> str:
    """The job script of one run, to be read and to be submitted."""
    return _run_script(job, spec.name, shlex.quote(str(folder)), _escaped(folder / LOG_FILE), folder.parent, {})


def array_script(name: str, folder: Path, indices: Sequence[int], job: JobConfig, runs: Path) -> str:
    """The job script of several runs as tasks of one array.

    Args:
        name: of the job.
        folder: has a link for every index, to the folder of its run.
        indices: of the tasks.
        job: what each asks for; `JobConfig.array` of them run at once.
        runs: the folder that all runs' folders are in.
    """
    header = {"array": f"{','.join(map(str, indices))}%{job.array}"}
    one = f'$(readlink -f {shlex.quote(str(folder))}/"$SLURM_ARRAY_TASK_ID")'
    return _run_script(job, name, one, f"{_escaped(folder)}/%a/{LOG_FILE}", runs, header)


def module_script(module: str, name: str, folder: Path, job: JobConfig) -> str:
    """The job script of another module in place of a run; it is called with its folder, and logs there."""
    log = _escaped(folder / LOG_FILE)
    return _run_script(job, name, shlex.quote(str(folder)), log, folder, {}, (module, ""))


def _run_script(
    job: JobConfig,
    name: str,
    folder: str,
    log: str,
    runs: Path,
    header: Mapping[str, str | None],
    program: tuple[str, str] = ("evmamba.launch.bench.run", SPEC_FILE),
) -> str:
    """As `run_script`; `folder` is the run's as the shell understands it, `program` a module and its file there."""
    template = "single_node" if job.nodes == 1 else "multi_node"
    command = f'{shlex.join([_python(job), "-m", program[0]])} "$folder"/{program[1]}'
    settings = [f"folder={folder}", f"command=({command})", *_start(job, runs)]
    if job.nodes > 1:
        settings.append(f"interface={shlex.quote(job.interface) if job.interface else ''}")
    full = _header(job, name, log) | {"signal": f"SIGUSR1@{job.warning or WARNING_SECONDS}", **header}
    if job.chain > 1:  # where requeueing is forbidden, the next job of the chain goes on
        full |= {"requeue": None, "no-requeue": ""}
    return _render(template, full, [*settings, *_environment(job)], job.sbatch)


def report_script(output: Path, job: JobConfig) -> str:
    """The job script that writes the report of a folder."""
    python = _python(job)
    submitter = sys.executable if _in_container(job) else python
    settings = [f"output={shlex.quote(str(output))}", *_start(job, output)]
    settings += [f"python={shlex.quote(python)}", f"submitter={shlex.quote(submitter)}"]
    header = _header(job, "evmamba-report", _escaped(output / "report.log"))
    return _render("report", header, [*settings, *_environment(job)], job.sbatch)


def _start(job: JobConfig, folder: Path) -> list[str]:
    """How processes are started: the command of a container, which sees `folder`, and srun's options."""
    mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in dict.fromkeys([*job.mounts, str(folder)])]
    container, srun = job.container or "", list(job.srun)
    if job.apptainer:
        nv = ["--nv"] if job.gpus_per_node or job.gres else []
        container = shlex.join(["apptainer", "exec", *nv, "--bind", ",".join(mounts), job.apptainer])
    if job.pyxis:
        srun += [f"--container-image={job.pyxis}", f"--container-mounts={','.join(mounts)}"]
    if job.gpus_per_task:
        srun.append("--gpu-bind=none")
    if job.numa:
        srun += ["--cpu-bind=cores", "--mem-bind=local", "--distribution=block:block"]
    return [f"container=({container})", f"srun=({shlex.join(srun)})"]


def _environment(job: JobConfig) -> list[str]:
    """Shell lines before the run. Modules with tasks of a user's own are named by whoever submits."""
    modules = os.environ.get(IMPORTS_VARIABLE)
    return [*([f"export {IMPORTS_VARIABLE}={shlex.quote(modules)}"] if modules else []), *job.environment]


def _escaped(path: Path) -> str:
    """A path for ``--output``, in which % begins a pattern.

    Raises:
        UserError: it has a backslash, which SLURM takes away there.
    """
    if "\\" in str(path):
        raise UserError(f"{path}: SLURM writes no log into a folder with a backslash in its name; rename it")
    return str(path).replace("%", "%%")


def _python(job: JobConfig) -> str:
    return job.python or ("python" if _in_container(job) else sys.executable)


def _in_container(job: JobConfig) -> bool:
    return bool(job.container or job.apptainer or job.pyxis)


def _header(job: JobConfig, name: str, log: str) -> dict[str, str | None]:
    """Options of the header; None takes the template's out."""
    per_node = None if job.gres or not job.gpus_per_node else str(job.gpus_per_node)
    return {
        "job-name": name,
        "account": job.account,
        "partition": job.partition,
        "qos": job.qos,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.tasks),
        "gpus-per-node": None if job.gpus_per_task else per_node,
        "gpus-per-task": str(job.gpus_per_task) if per_node and job.gpus_per_task else None,
        "gres": job.gres,
        "cpus-per-task": None if job.cpus_per_task is None else str(job.cpus_per_task),
        "mem": job.mem,
        "time": job.time,
        "exclusive": "" if job.exclusive else None,
        "output": log,
    }


def _render(template: str, header: Mapping[str, str | None], settings: Sequence[str], more: Sequence[str]) -> str:
    """A template with other options in its header and other lines between "Settings" and "End of settings"."""
    lines = (TEMPLATES / f"{template}.sbatch").read_text(encoding="utf-8").splitlines(keepends=True)
    begin, end = (lines.index(mark) for mark in SETTINGS)
    remaining = dict(header)
    head: list[str] = []
    last = 0
    for line in lines[:begin]:
        found = re.match(r"#SBATCH --([\w-]+)", line)
        if found and found[1] in remaining:
            value = remaining.pop(found[1])
            if value is None:
                continue
            line = _directive(found[1], value)
        head.append(line)
        if found:
            last = len(head)
    extra = [_directive(name, value) for name, value in remaining.items() if value is not None]
    for option in more:
        if option != printable(option):
            raise UserError(f"the sbatch option {option!r} has a line break or a control character")
        extra.append(f"#SBATCH {option}\n")
    head[last:last] = extra
    return "".join([*head, lines[begin], *(f"{line}\n" for line in settings), *lines[end:]])


def _directive(name: str, value: str) -> str:
    if value != printable(value):  # the rest of a line that breaks would be a command
        raise UserError(
            f"#SBATCH --{name} cannot hold {value!r}: it has a line break or a control character; rename it"
        )
    return f"#SBATCH --{name}={shlex.quote(value)}\n" if value else f"#SBATCH --{name}\n"


def available() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None


def sbatch(
    script: Path,
    after: Sequence[JobId] = (),
    condition: str = "afterok",
    one_of: bool = False,
    arguments: Sequence[str] = (),
) -> list[str]:
    """The command that submits a script.

    Args:
        script: file.
        after: jobs that must have ended before.
        condition: "afterok" (well), "afternotok" (not well), "aftercorr" (each task of an array after the same task of
            another that ended well), or "afterany". If it cannot come true the job is cancelled.
        one_of: whether one of the jobs is enough.
        arguments: for the script.
    """
    command = ["sbatch", "--parsable"]
    if after:
        each = f"?{condition}:" if one_of else ":"
        command.append(f"--dependency={condition}:{each.join(map(str, after))}")
        if condition != "afterany":
            command.append("--kill-on-invalid-dep=yes")
    return [*command, str(script), *arguments]


def submit(command: Sequence[str]) -> int:
    """Run `sbatch`'s command and return the job's number.

    Raises:
        UserError: there is no sbatch, or it refuses; its words are in the message.
    """
    said = _call(command)
    try:
        return int(said.strip().splitlines()[-1].split(";")[0])
    except (ValueError, IndexError):
        raise UserError(f"{shlex.join(command)}: gave no job number but {said.strip()!r}") from None


def cancel(jobs: Sequence[JobId]) -> None:
    """Cancel jobs; those that have ended are none to complain about."""
    if jobs:
        _call(["scancel", *map(str, jobs)])


@dataclass(frozen=True)
class Node:
    """What a node has, as SLURM counts it.

    Attributes:
        cpus: cores or threads that jobs can ask for.
        gpus: of all kinds.
    """

    cpus: int
    gpus: int


def node(name: str) -> Node | None:
    """What a node has; None where nobody says."""
    fields = dict(re.findall(r"(\w+)=(\S*)", _ask(["scontrol", "show", "node", "--oneliner", name]) or ""))
    if "CPUTot" not in fields:
        return None
    # As gpu:a100:4(S:0-1),gpu:h100:4
    gpus = re.findall(r"gpu(?::[^:,(]+)?:(\d+)", fields.get("Gres", ""))
    return Node(int(fields["CPUTot"]), sum(map(int, gpus)))


@dataclass(frozen=True)
class Job:
    """What SLURM says about a job.

    Attributes:
        id: see `JobId`.
        state: SLURM's word, e.g. "PENDING", "RUNNING", "TIMEOUT".
        reason: why it waits or ended so, SLURM's word, e.g. "Dependency", "NodeDown"; "" for none.
        nodes: where it runs or ran, e.g. "n[1-2]"; "" for nowhere yet.
        elapsed: time since its (last) start, e.g. "1-02:03:04".
        exit: exit status and signal, "1:0".
        restarts: how often it was requeued.
        limit: its time limit.
    """

    id: JobId
    state: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    exit: str = ""
    restarts: int = 0
    limit: str = ""

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def saved(self) -> bool:
        """Whether it was stopped from outside and said so: started again, it continues."""
        return self.state == "FAILED" and self.exit.split(":")[0] == str(os.EX_TEMPFAIL)


def jobs(ids: Iterable[JobId], user: str | None = None) -> dict[JobId, Job] | None:
    """What SLURM still knows of these jobs; None where it is not installed or does not answer, be it for one of them.

    The controller knows live jobs and those that ended some minutes ago, with most details; accounting, where there is
    any, knows the older ones.

    Args:
        ids: their numbers.
        user: whose they are; None: of whoever asks.
    """
    wanted = set(ids)
    queue = _in_queue(wanted, user)
    if queue is None:
        return None
    found = {job.id: job for number in queue if (job := _from_controller(number))}
    if any(number not in found for number in queue):
        return None
    missing = wanted - set(found)
    if missing:
        found |= {job.id: job for job in _from_accounting(missing)}
    return found


def _in_queue(wanted: set[JobId], user: str | None) -> list[JobId] | None:
    """Those that the controller knows (it complains of a list with one unknown number, so it is asked for all)."""
    whose = f"--user={user}" if user else "--me"
    said = _ask(["squeue", "--noheader", "--states=all", "--array", whose, "--format=%i"])
    if said is None:
        return None
    known = set(said.split())
    return sorted((number for number in wanted if str(number) in known), key=str)


def _from_controller(number: JobId) -> Job | None:
    said = _ask(["scontrol", "show", "job", "--oneliner", str(number)]) or ""
    fields = dict(re.findall(r"(\w+)=(\S*)", said))
    if "JobState" not in fields:
        return None
    return Job(
        id=number,
        state=fields["JobState"],
        reason=_word(fields.get("Reason")),
        nodes=_word(fields.get("NodeList")),
        elapsed=fields.get("RunTime", ""),
        exit=fields.get("ExitCode", ""),
        restarts=int(fields.get("Restarts", 0)),
        limit=fields.get("TimeLimit", ""),
    )


def _from_accounting(wanted: set[JobId]) -> list[Job]:
    columns = "JobID,State,Reason,NodeList,Elapsed,ExitCode,Timelimit"
    command = ["sacct", "--allocations", "--noheader", "--parsable2", f"--format={columns}"]
    found = []
    said = _ask([*command, f"--jobs={','.join(sorted(map(str, wanted)))}"]) or ""
    for line in said.splitlines():
        words = line.split("|")
        if len(words) == 7 and re.fullmatch(r"\d+(_\d+)?", words[0]):
            number, state, reason, nodes, elapsed, status, limit = words
            # "CANCELLED by 1000"
            job = Job(number if "_" in number else int(number), state.split()[0], _word(reason), _word(nodes), elapsed)
            found.append(dataclasses.replace(job, exit=status, limit=limit))
    return found


def _word(text: str | None) -> str:
    return "" if text is None or text in ("None", "(null)", "None assigned", "Unknown") else text


def _ask(command: Sequence[str]) -> str | None:
    """What a query prints; None where it fails, since not to know is an answer here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _call(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS, env=_clean_environment()
        )
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} here; this needs a login node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {COMMAND_SECONDS} s; try again later") from None
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"{shlex.join(command)}: {said or f'exit status {done.returncode}'}")
    return done.stdout


def _clean_environment() -> dict[str, str]:
    """Without the variables of a job that this may be in: a job submitted from there would inherit its requests."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in OF_THE_CLUSTER
    }
