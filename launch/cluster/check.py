"""`evmamba cluster check`: a job of two minutes that tries what trainings rely on, and the settings that fit.

`check_job` is what runs on the nodes; here its job is submitted, its answers are read, and told.
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml
from rich.console import Console
from rich.table import Table

from evmamba.errors import UserError
from evmamba.files import write_text
from evmamba.launch.cluster import slurm
from evmamba.launch.cluster.check_job import ANSWERS_FOLDER, REQUEUED_FILE, Answers
from evmamba.launch.cluster.settings import Cluster, JobConfig
from evmamba.launch.cluster.slurm import SCRIPT_FILE, Job
from evmamba.launch.store.spec import LOG_FILE
from evmamba.tasks import TASKS

MODULE = "evmamba.launch.cluster.check_job"
JOB_FILE = "job.json"
# The limit of the job, and when SLURM's signal comes before it.
LIMIT, WARNING = "3:00", 90
POLL_SECONDS = 2.0
# Jobs of a training where a requeue is refused.
CHAIN = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        what: its name.
        good: whether trainings can rely on it; None: it could not be tried.
        said: what was seen, and what to do about it.
    """

    what: str
    good: bool | None
    said: str


def check(cluster: Cluster, folder: Path, console: Console, limit: str = LIMIT, warning: int = WARNING) -> bool:
    """Submit the job, or find the one that was submitted to this folder before, wait for its end and tell.

    Where settings have changed since, and that job has ended, another takes its place.

    Args:
        cluster: its settings; those of the first task's trainings are tried, on two nodes unless `nodes` says more or
            less.
        folder: that all nodes see; for the job's files.
        console: where to print.
        limit: time limit of the job.
        warning: seconds before it at which the signal is asked for.

    Returns:
        Whether nothing was found that a training could not do without.

    Raises:
        UserError: there is no sbatch, it refuses, the job left no answers, or one of other settings has not
            ended.
    """
    given = cluster[next(iter(TASKS))]
    nodes = given.nodes if "nodes" in cluster.given else 2
    job = dataclasses.replace(given, nodes=nodes, time=limit, warning=warning, strategy=None, chain=1)
    script = slurm.module_script(MODULE, "evmamba-check", folder, job)
    if not _is_submitted(script, folder):
        (folder / ANSWERS_FOLDER).mkdir(parents=True, exist_ok=True)
        write_text(folder / SCRIPT_FILE, script)
        write_text(folder / JOB_FILE, json.dumps(slurm.submit(slurm.sbatch(folder / SCRIPT_FILE))))
    number = json.loads((folder / JOB_FILE).read_text())
    console.print(f"job {number}: {nodes} node{'s' if nodes > 1 else ''} x {job.tasks}, log in {folder / LOG_FILE}")
    ended = _wait(number, console)
    answers = read_answers(folder)
    if not answers:
        raise UserError(f"job {number} ended as {ended.state} and left no answers; see {folder / LOG_FILE}")
    findings = findings_of(answers, (folder / REQUEUED_FILE).is_file(), job)
    console.print(_table(findings))
    console.print("\n# settings that fit; cluster.yaml")
    fitting = settings_that_fit(cluster.given, job, answers, findings, slurm.node(answers[0].node))
    console.print(yaml.safe_dump(fitting, sort_keys=False), markup=False, highlight=False, end="", soft_wrap=True)
    return all(finding.good is not False for finding in findings if finding.what not in OPTIONAL)


def _is_submitted(script: str, folder: Path) -> bool:
    """Whether a job of this script was; what one of other settings left is taken away.

    Raises:
        UserError: one of other settings has not ended.
    """
    if not (folder / JOB_FILE).is_file():
        return False
    if (folder / SCRIPT_FILE).read_text(encoding="utf-8") == script:
        return True
    number = json.loads((folder / JOB_FILE).read_text())
    if _ask(number).live:
        raise UserError(
            f"job {number} of {folder} tries other settings and has not ended; wait or scancel {number}, then again"
        )
    for pattern in (JOB_FILE, f"{ANSWERS_FOLDER}/*", REQUEUED_FILE, "done-*", "lock*"):
        for path in folder.glob(pattern):
            path.unlink()
    return False


def _ask(number: int) -> Job:
    told = slurm.jobs([number])
    if told is None:
        raise UserError("squeue does not answer; the same command goes on when it does")
    return told.get(number, Job(number, "UNKNOWN"))


def _wait(number: int, console: Console) -> Job:
    """The job when it has ended for good; what it waits for is told meanwhile."""
    with console.status("") as status:
        while True:
            job = _ask(number)
            if not job.live:
                return job
            again = ", once more" if job.restarts else ""
            status.update(f"{job.state.lower()}{again} {job.elapsed} {job.reason}")
            time.sleep(POLL_SECONDS)


def read_answers(folder: Path) -> list[Answers]:
    """What the processes found, by rank."""
    paths = sorted((folder / ANSWERS_FOLDER).glob("[0-9]*.json"), key=lambda path: int(path.stem))
    return [msgspec.json.decode(path.read_bytes(), type=Answers) for path in paths]


RENDEZVOUS, SIGNAL, REQUEUE, LOCK = "rendezvous", "signal", "requeue", "file locks"
# Without these trainings are slower or need a setting, and go on.
OPTIONAL = (REQUEUE, "processes")


def findings_of(answers: Sequence[Answers], requeued: bool, job: JobConfig) -> list[Finding]:
    """What the answers mean."""
    first = answers[0]
    nodes = sorted({answer.node for answer in answers})
    wanted = job.nodes * job.tasks
    findings = [
        Finding(
            "processes",
            len(answers) == wanted and all(job.gpus_per_node == 0 or answer.gpus for answer in answers),
            f"{len(answers)} of {wanted} on {', '.join(nodes)}; each sees {_range(a.gpus for a in answers)} "
            f"GPUs and may use {_range(a.cpus for a in answers)} cores",
        )
    ]
    errors = [f"rank {answer.rank} on {answer.node}: {answer.error}" for answer in answers if answer.error]
    seen = [answer.shared_s for answer in answers if answer.shared_s is not None]
    if len(seen) == len(answers):
        findings.append(Finding("shared folder", True, f"all see each other's files, within {max(seen):.1f} s"))
    else:
        why = "; ".join(errors) or "not all see each other's files"
        findings.append(Finding("shared folder", False, f"{why}; choose an --output that all nodes share"))
    locked = [answer.locked for answer in answers[1:] if answer.locked is not None]
    if not locked:
        findings.append(Finding(LOCK, None, "not tried: one process alone, or no shared folder"))
    elif all(locked):
        findings.append(Finding(LOCK, True, "hold for every process"))
    else:
        findings.append(Finding(LOCK, False, "do not hold between nodes: submit and resume from one machine only"))
    findings.append(_rendezvous(answers, errors))
    late = [answer.rank for answer in answers if answer.signal_s is None]
    if late:
        who = ", ".join(map(str, late))
        said = f"did not reach rank {who}: what was trained since the last checkpoint is lost at the time limit"
        findings.append(Finding(SIGNAL, False, said))
    else:
        said = f"reached every process, {_range(answer.signal_s for answer in answers)} s after its start"
        findings.append(Finding(SIGNAL, True, said))
    how = "by the run itself" if first.has_scontrol else "by the job's script, as scontrol is missing where runs are"
    said = f"works, {how}" if requeued else f"refused, or not before the check looked; chain: {CHAIN} does without"
    findings.append(Finding(REQUEUE, requeued, said))
    return findings


def _rendezvous(answers: Sequence[Answers], errors: Sequence[str]) -> Finding:
    best = best_interface(answers)
    tried = [meeting.interface or "left open" for meeting in answers[0].meetings]
    if best is None:
        reasons = [meeting.error for answer in answers for meeting in answer.meetings if meeting.error]
        why = (reasons or list(errors) or ["nothing was tried"])[0]
        return Finding(RENDEZVOUS, False, f"processes do not find each other ({', '.join(tried)}): {why}")
    speeds = [
        f"{name} {'fails' if meeting.error else f'{meeting.gb_per_s:.2f} GB/s'}"
        for name, meeting in zip(tried, answers[0].meetings, strict=True)
    ]
    return Finding(RENDEZVOUS, True, f"gloo, 16 MB all-reduce: {', '.join(speeds)}")


def best_interface(answers: Sequence[Answers]) -> str | None:
    """The interface through which all processes met and sent fastest; "" to leave it open, None for none.

    One that is left open stays so unless a named one is clearly faster (by a fifth).
    """
    speeds: dict[str, float] = {}
    for number, meeting in enumerate(answers[0].meetings):
        of_all = [answer.meetings[number] for answer in answers if len(answer.meetings) > number]
        if len(of_all) == len(answers) and not any(found.error for found in of_all):
            speeds[meeting.interface] = min(found.gb_per_s for found in of_all)
    if not speeds:
        return None
    return max(speeds, key=lambda name: speeds[name] * (1.2 if name == "" else 1.0))


def settings_that_fit(
    given: Mapping[str, Any],
    job: JobConfig,
    answers: Sequence[Answers],
    findings: Sequence[Finding],
    node: slurm.Node | None,
) -> dict[str, Any]:
    """The settings that were given, with what was found put in where nothing was said."""
    fitting = {key: _plain(value) for key, value in given.items() if value not in ({}, [], None)}
    if node is not None:
        if node.gpus and not job.gres and "gpus_per_node" not in given:
            fitting["gpus_per_node"] = node.gpus
        per_node = int(fitting.get("tasks_per_node") or fitting.get("gpus_per_node") or 1)
        fitting.setdefault("cpus_per_task", max(1, node.cpus // max(1, per_node)))
    best = best_interface(answers)
    if best and not job.interface and len(answers[0].meetings) > 1:  # one alone was asked for by `environment`
        fitting["interface"] = best
    if any(finding.what == REQUEUE and not finding.good for finding in findings):
        fitting.setdefault("chain", CHAIN)
    return fitting


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _range(values: Any) -> str:
    found = sorted({value for value in values if value is not None})
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}" if found else "?"


def _table(findings: Sequence[Finding]) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        mark = {True: "[green]yes[/]", False: "[red]no[/]", None: "[dim]?[/]"}[finding.good]
        shown.add_row(finding.what, mark, finding.said)
    return shown
