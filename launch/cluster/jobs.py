"""The runs of a folder and what has become of each: from result files, progress files, ``jobs.json``, and SLURM.

``jobs.json`` remembers which job each run was submitted as. A folder without it (of `evmamba bench`, or `--local`) is
as good: its runs are those with a ``spec.json``.
"""

import datetime
import getpass
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from rich.table import Table
from rich.text import Text

from evmamba.errors import UserError, first_few, printable
from evmamba.launch.bench.progress import headline
from evmamba.launch.cluster import slurm
from evmamba.launch.cluster.slurm import Job, JobId
from evmamba.launch.store.progress import PROGRESS_FILE, last_words, read_progress
from evmamba.launch.store.results import FILE_NAME, Result, now, read_result, write_json, write_result
from evmamba.launch.store.spec import (
    NOT_STARTED,
    RUNS_FOLDER,
    SPEC_FILE,
    Spec,
    TrainingSpec,
    failed_result,
    read_spec,
    why_not_started,
)
from evmamba.tasks.plain_files import Whole, read_json
from evmamba.tasks.training import slurm_job
from evmamba.tasks.training.heartbeat import silence

JOBS_FILE = "jobs.json"
SCHEMA = 1
REPORT = "report"
# A progress file that has not changed for so long is no sign of life any more.
SILENT_SECONDS = 600
# Names of users.
USER = r"[\w.@-]*"

State = Literal["finished", "failed", "running", "queued", "waiting", "stopped", "not submitted", "unknown"]
STYLES: dict[State, str] = {
    "finished": "green",
    "failed": "red",
    "running": "bold",
    "queued": "yellow",
    "waiting": "dim",
    "stopped": "yellow",
    "not submitted": "dim",
    "unknown": "yellow",
}
# What SLURM's last word on a job means, and what to do about it.
ENDINGS = {
    "TIMEOUT": "time limit of {limit} reached; --resume goes on from the last checkpoint",
    "OUT_OF_MEMORY": "out of memory on the node (not the GPU's); raise mem, or lower num_workers",
    "NODE_FAIL": "node {nodes} failed; --resume goes on from the last checkpoint",
    "PREEMPTED": "preempted and not requeued; --resume goes on from the last checkpoint",
    "BOOT_FAIL": "node {nodes} did not start; --resume tries again",
    "DEADLINE": "the job's deadline passed",
    "CANCELLED": "cancelled",
    "FAILED": "ended with exit status {exit} and without a result; last words: {last}",
    "COMPLETED": "ended without a result; last words: {last}",
}
SAVED = "saved; --resume goes on"


class _Document(msgspec.Struct):
    """``jobs.json`` itself."""

    schema: int
    jobs: dict[str, list[Whole | Annotated[str, msgspec.Meta(pattern=r"^\d+_\d+$")]]]
    order: list[str]
    cluster: dict[str, Any]
    follow_ups: dict[str, list[Whole]] = {}
    user: Annotated[str, msgspec.Meta(pattern=f"^{USER}$")] = ""


@dataclass
class JobBook:
    """``jobs.json``: the number of each run's job, and the report's, by name; earlier numbers of a run are kept.

    Attributes:
        folder: the output folder.
        submitted: run -> its jobs, the newest last; the report's under "report".
        order: runs in the order of the graph.
        cluster: `Cluster.given`, for `evmamba submit --resume`.
        follow_ups: the first job of a chain, as text -> the others.
        user: who submitted last; "" for nobody or not known.
    """

    folder: Path
    submitted: dict[str, list[JobId]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    cluster: dict[str, Any] = field(default_factory=dict)
    follow_ups: dict[str, list[int]] = field(default_factory=dict)
    user: str = ""

    @staticmethod
    def read(folder: Path) -> "JobBook":
        """The book of a folder, empty where there is none.

        Raises:
            UserError: the file is damaged or of another version.
        """
        path = folder / JOBS_FILE
        if not os.path.lexists(path):
            return JobBook(folder)
        document = read_json(path)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise UserError(f"{path}: not a list of jobs of this evmamba's version")
        try:
            told = msgspec.convert(document, _Document)
        except msgspec.ValidationError as error:
            raise UserError(f"{path}: not a list of jobs of this evmamba's version ({error})") from error
        for name in (*told.jobs, *told.order):
            if Path(name).name != name or name != printable(name):
                raise UserError(f"{path}: '{name}' is no name of a run")
        return JobBook(folder, told.jobs, told.order, told.cluster, told.follow_ups, told.user)

    def write(self) -> None:
        document = {"schema": SCHEMA, "order": self.order, "jobs": self.submitted, "cluster": self.cluster}
        write_json(self.folder / JOBS_FILE, document | {"follow_ups": self.follow_ups, "user": self.user})

    def jobs_of(self, name: str) -> list[JobId]:
        """The jobs of a run's last submission: one, or a chain of them."""
        if not self.submitted.get(name):
            return []
        first = self.submitted[name][-1]
        return [first, *self.follow_ups.get(str(first), [])]

    def job_of(self, name: str, told: Mapping[JobId, Job]) -> tuple[JobId | None, Job | None]:
        """The job that says how a run is: of a chain the first that is live, else the last that was started."""
        ids = self.jobs_of(name)
        known = [told[number] for number in ids if number in told]
        started = [job for job in known if job.state != "CANCELLED"]
        job = next((job for job in known if job.live), None) or next(reversed(started or known), None)
        return (job.id if job else ids[0] if ids else None), job

    def add(self, name: str, job: JobId) -> None:
        """Note a job, at once on the disk: it exists whatever happens next."""
        self.submitted.setdefault(name, []).append(job)
        self.user = _user()
        self.write()

    def add_follow_up(self, first: JobId, job: int) -> None:
        """Note a job that goes on where the chain that began with `first` stopped."""
        self.follow_ups.setdefault(str(first), []).append(job)
        self.write()

    def ask(self) -> dict[JobId, Job] | None:
        """What SLURM says about the newest jobs of every run; None where it does not answer."""
        ids = [number for name in self.submitted for number in self.jobs_of(name)]
        return slurm.jobs(ids, self.user or None) if ids else {}

    @property
    def is_anothers(self) -> bool:
        """Whether somebody else submitted, whose jobs SLURM may hide from whoever asks now."""
        return self.user not in ("", _user())


def _user() -> str:
    """Who asks, as SLURM would call them; "" where the system does not say, or not in a name of a user alone."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a number without an entry, as in a container
        return ""
    return name if re.fullmatch(USER, name) else ""


@dataclass
class RunState:
    """One run, for people.

    Attributes:
        run: its name.
        state: "stopped" is neither finished nor failed nor at work, e.g. interrupted: --resume goes on; "unknown" was
            submitted, but SLURM does not answer here.
        said: the rest of the sentence: what it waits for, how far it is, its main metric, why it failed.
        blocked_by: of a failed one that was never started, see `Result`.
        job: SLURM's number, see `slurm.JobId`.
        nodes: where.
        elapsed: time since its start.
        restarts: how often it was requeued.
        progress: phase, done, total, loss of a running one.
        metrics: of a finished one.
    """

    run: str
    state: State
    said: str = ""
    blocked_by: str | None = None
    job: JobId | None = None
    nodes: str = ""
    elapsed: str = ""
    restarts: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def states(folder: Path, ended: bool = False) -> list[RunState]:
    """The state of every run of a folder, those that others need first.

    Args:
        folder: the output folder.
        ended: all jobs have, unless SLURM says otherwise: a progress file of a moment ago is of one that has just died.

    Raises:
        UserError: the folder holds no runs.
    """
    specs, book = read_specs(folder), JobBook.read(folder)
    found: dict[str, RunState] = {}
    told = book.ask()
    jobs = told or {}

    def why_silent(number: JobId | None) -> str:
        if told is None:
            return "SLURM does not answer here"
        return f"job {number} is {book.user}'s, and SLURM does not show it to you" if book.is_anothers else ""

    for name, spec in specs.items():
        number, job = book.job_of(name, jobs)
        found[name] = _state(spec, folder / RUNS_FOLDER / name, number, job, found, why_silent(number), ended)
    number, job = book.job_of(REPORT, jobs)
    if number is not None:
        found[REPORT] = _report_state(folder, number, job, why_silent(number))
    return list(found.values())


def table(states: Sequence[RunState]) -> Table:
    """The states for a terminal: what there is to say stands under a run's name, as reasons can be long."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("run", overflow="fold")
    for header in ("state", "job", "node", "elapsed"):
        shown.add_column(header, no_wrap=True)
    for state in states:
        name = Text(state.run, style="bold" if state.state == "running" else "")
        # The reason of one that blocks others stands at its own name, a few lines above.
        said = NOT_STARTED.format(state.blocked_by) if state.blocked_by else state.said
        if said:
            name.append(f"\n  {said}", style="dim")
        job = "" if state.job is None else str(state.job)
        shown.add_row(name, Text(state.state, style=STYLES[state.state]), job, Text(state.nodes), state.elapsed)
    return shown


def record_failures(folder: Path) -> list[str]:
    """Give every run that ended without a result one that says why, and return their names.

    A run is left alone while its job is live, and where SLURM does not answer, unless this is called in a job: the
    report's, which starts when all others have ended.
    """
    in_job = slurm_job.job_id() is not None
    over = ("failed", "stopped") if in_job else ("failed",)
    told = {state.run: state for state in states(folder, ended=in_job)}
    recorded: dict[str, Result] = {}
    for name, spec in read_specs(folder).items():
        run_folder, state = folder / RUNS_FOLDER / name, told[name]
        if _result(run_folder) is None and state.state in over:
            recorded[name] = failed_result(spec, state.said, now(), state.blocked_by)
            recorded[name].run = name
            write_result(recorded[name], run_folder)
    return list(recorded)


def read_specs(folder: Path) -> dict[str, Spec]:
    """The specs of a folder's runs by name, those that others need first.

    The folder's name is the run's, also where another version of evmamba would give the spec another hash.

    Raises:
        UserError: there are none.
    """
    runs = folder / RUNS_FOLDER
    # What was put aside from an earlier attempt (NAME.failed-1) holds a spec too.
    names = JobBook.read(folder).order or [p.parent.name for p in sorted(runs.glob(f"*/{SPEC_FILE}"))]
    paths = [runs / name / SPEC_FILE for name in names if ".failed-" not in name]
    specs = {path.parent.name: read_spec(path) for path in paths if path.is_file()}
    if not specs:
        raise UserError(f"{folder}: no runs here; 'evmamba submit' and 'evmamba bench' make them with --output")
    ordered: dict[str, Spec] = {}

    for name in specs:
        waiting = [name]
        while waiting:
            lacking = [needed for needed in specs[waiting[-1]].needs if needed in specs and needed not in ordered]
            if not lacking:
                last = waiting.pop()
                ordered.setdefault(last, specs[last])
            elif lacking[0] in waiting:
                raise UserError(f"{runs}: the runs {first_few(waiting)} need each other, so that none can begin")
            else:
                waiting.append(lacking[0])
    return ordered


def _state(
    spec: Spec,
    folder: Path,
    number: JobId | None,
    job: Job | None,
    others: Mapping[str, RunState],
    silence: str,
    ended: bool,
) -> RunState:
    state = RunState(folder.name, "not submitted", job=number)
    if job is not None:
        state.nodes, state.elapsed, state.restarts = job.nodes, job.elapsed, job.restarts
    result = _result(folder)
    if result is not None and result.finished:
        tested = not isinstance(spec, TrainingSpec) or spec.test
        trained = f"trained, {result.training.get('steps')} steps"
        state.state, state.said = "finished", headline(result) if tested else trained
        state.metrics, state.elapsed = result.metrics, _duration(result.provenance.get("duration_s"))
    elif job is not None and job.live and not (result is not None and job.state == "COMPLETING"):
        _live(state, spec, folder, job, others)
    elif job is not None and job.saved:
        state.state, state.said = "stopped", SAVED
    elif number is not None and (
        stopped := next((name for name in spec.needs if name in others and others[name].state == "stopped"), None)
    ):
        state.state, state.said = "stopped", f"not started: needs {stopped}, which was stopped; --resume goes on"
    elif result is not None:
        state.state, state.said, state.blocked_by = "failed", result.reason or "", result.blocked_by
        state.elapsed = _duration(result.provenance.get("duration_s"))
    elif lacking := next(
        (others[name] for name in spec.needs if name in others and others[name].state == "failed"), None
    ):
        # Whatever SLURM calls it: a run whose need failed is cancelled, or was never queued.
        state.state = "failed"
        state.blocked_by, state.said = why_not_started(lacking.run, lacking.said, lacking.blocked_by)
    elif job is not None:
        state.state, state.said = "failed", _ending(job, folder)
    else:
        _unknown(state, folder, number, silence, ended)
    return state


def _live(state: RunState, spec: Spec, folder: Path, job: Job, others: Mapping[str, RunState]) -> None:
    if job.state == "PENDING":
        waiting = [name for name in spec.needs if name in others and others[name].state != "finished"]
        if waiting and job.reason in ("Dependency", "None", ""):
            state.state, state.said = "waiting", f"for {', '.join(waiting)}"
        else:
            state.state = "queued"
            state.said = f"requeued {_times(job.restarts)}" if job.restarts else job.reason
        return
    state.state = "running" if job.state != "REQUEUE_HOLD" else "queued"
    state.progress = _progress(folder) or {}
    parts = [_how_far(state.progress)] if state.progress else []
    if job.state == "RUNNING" and (silent := silence(folder)):
        parts.append(silent)
    if job.state not in ("RUNNING", "COMPLETING"):
        parts.append(job.state.lower())
    if job.restarts:
        parts.append(f"requeued {_times(job.restarts)}")
    state.said = ", ".join(parts)


def _unknown(state: RunState, folder: Path, number: JobId | None, silence: str, ended: bool) -> None:
    """No result, and SLURM has nothing to say: another way of running it, or long ago, or for the reason `silence`."""
    progress = _progress(folder)
    if ended and silence and number is not None:
        state.state, state.said = "failed", ENDINGS["COMPLETED"].format(last=last_words(folder))
    elif progress is not None and progress["age"] < SILENT_SECONDS and not (ended and number is not None):
        state.state, state.progress, state.said = "running", progress, _how_far(progress)
    elif number is not None and silence:
        state.state = "unknown"
        state.said = f"{silence}; there is no result; last words: {last_words(folder)}"
    elif number is not None:
        state.state = "failed"
        state.said = f"job {number} is no longer known to SLURM and left no result; last words: {last_words(folder)}"
    elif progress is not None:
        state.state, state.said = "stopped", f"{_how_far(progress)}, silent for {_duration(progress['age'])}"


def _report_state(folder: Path, number: JobId, job: Job | None, silence: str) -> RunState:
    state = RunState(REPORT, "finished" if (folder / "report.md").is_file() else "failed", job=number)
    if job is not None:
        state.nodes, state.elapsed, state.restarts = job.nodes, job.elapsed, job.restarts
    if job is not None and job.live:
        state.state = "waiting" if job.reason == "Dependency" else "queued" if job.state == "PENDING" else "running"
        state.said = "for all runs" if state.state == "waiting" else job.reason
    elif state.state == "finished":
        state.said = str(folder / "report.md")
    elif job is None and silence:
        state.state, state.said = "unknown", silence
    else:
        state.said = f"see {folder / 'report.log'}"
    return state


def _ending(job: Job, folder: Path) -> str:
    said = ENDINGS.get(job.state, "ended as {state}; last words: {last}")
    return said.format(
        limit=job.limit, nodes=job.nodes or "?", exit=job.exit.split(":")[0], state=job.state, last=last_words(folder)
    )


def _result(folder: Path) -> Result | None:
    """The run's own result; one of another run, or a broken file, is none."""
    try:
        result = read_result(folder / FILE_NAME)
    except UserError:
        return None
    return result if result.run == folder.name else None


def _progress(folder: Path) -> dict[str, Any] | None:
    progress = read_progress(folder)
    if progress is None:
        return None
    age = datetime.datetime.now().timestamp() - (folder / PROGRESS_FILE).stat().st_mtime
    return asdict(progress) | {"age": round(age)}


def _how_far(progress: Mapping[str, Any]) -> str:
    done, total, loss = (progress.get(key) for key in ("done", "total", "loss"))
    share = f" {100 * done / total:.0f} % ({done}/{total})" if done is not None and total else ""
    return f"{progress['phase']}{share}" + ("" if loss is None else f", loss {loss:.3f}")


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _duration(seconds: float | None) -> str:
    """As SLURM writes it: [days-]hours:minutes:seconds."""
    if seconds is None:
        return ""
    days, rest = divmod(round(seconds), 86400)
    return f"{f'{days}-' if days else ''}{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
