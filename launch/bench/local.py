"""Running a benchmark here: one process a run, one after the other, or trainings side by side on a CPU's cores.

`run_here` leaves out what is finished already, and goes on after a failure.
"""

import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from evmamba.errors import UserError
from evmamba.launch.bench.progress import RunProgress
from evmamba.launch.store.progress import last_words
from evmamba.launch.store.results import FILE_NAME, Result, git_state, now, read_result, write_result
from evmamba.launch.store.spec import (
    LOG_FILE,
    RUNS_FOLDER,
    SPEC_FILE,
    CostSpec,
    Spec,
    TrainingSpec,
    failed_result,
    finished_before,
    result_before,
    why_not_started,
)
from evmamba.processor import usable_cores
from evmamba.tasks.training.lease import check_free

POLL_SECONDS = 0.2


def run_here(
    specs: Sequence[Spec], output: Path, progress: RunProgress, force: bool = False, jobs: int = 1
) -> tuple[list[Result], bool]:
    """Run specs in their order and return one result each, and whether Ctrl-C ended it before its time.

    A finished run with the same spec is not repeated. A failed run is a result like any other; runs that need it are
    not started, which is their reason. After Ctrl-C the runs at work are stopped, finished ones stay, and what is
    missing is "failed: interrupted" in what is returned (not on disk).

    Args:
        specs: what a run needs stands before it.
        output: folder of the benchmark.
        progress: told of every run.
        force: repeat finished runs too.
        jobs: so many trainings side by side, each with its share of the cores. What is timed runs alone.
    """
    with _terminated_is_interrupted(), progress, ThreadPoolExecutor(jobs) as pool:
        return _Queue(specs, output, progress, force, jobs, pool).run()


@dataclass
class _Queue:
    """Runs on their way; all but `_one` happens in the calling thread."""

    specs: Sequence[Spec]
    output: Path
    progress: RunProgress
    force: bool
    jobs: int
    pool: ThreadPoolExecutor
    results: dict[str, Result] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    at_work: dict[Future[Result], tuple[Spec, datetime.datetime]] = field(default_factory=dict)
    elsewhere: str | None = None
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(self) -> tuple[list[Result], bool]:
        try:
            self._all()
        except KeyboardInterrupt:
            self.stopping.set()
            self._all()
        except BaseException:
            self.stopping.set()
            raise
        if self.elsewhere:
            self.progress.remark(
                f"finished runs of another commit were taken over ({self.elsewhere}); --force repeats them"
            )
        return [self.results[spec.name] for spec in self.specs], self.stopping.is_set()

    def _all(self) -> None:
        at_work = {spec.name for spec, _ in self.at_work.values()}
        for spec in self.specs:
            if spec.name not in self.results and spec.name not in at_work:
                self._next(spec)
        self._settle(0)

    def _next(self, spec: Spec) -> None:
        """Start a run, or say why not; waits until there is room, and what it needs has ended."""
        folder = self.output / RUNS_FOLDER / spec.name
        # The first of a table's networks has just measured this one too.
        measured = isinstance(spec, CostSpec) and not self.started.isdisjoint(spec.needs)
        previous = finished_before(spec, folder) if measured or not self.force else None
        if previous is not None:
            self.progress.skip(spec, "measured in turns" if measured else "finished before")
            self.elsewhere = self.elsewhere or _other_commit(previous)
            self.results[spec.name] = previous
            return
        needed = any(other.name in spec.needs for other, _ in self.at_work.values())
        self._settle(0 if needed or not isinstance(spec, TrainingSpec) else self.jobs - 1)
        start = now()
        if self.stopping.is_set():
            self.results[spec.name] = failed_result(spec, "interrupted", start)
            return
        if measured and (result := result_before(spec, folder)) is not None:
            self._ended(spec, result)
            return
        self.progress.start(spec)
        self.started.add(spec.name)
        ended = (self.results[name] for name in spec.needs if name in self.results)
        if (lacking := next((result for result in ended if not result.finished), None)) is not None:
            blocked_by, reason = why_not_started(lacking.run, lacking.reason or "", lacking.blocked_by)
            result = failed_result(spec, reason, start, blocked_by)
            spec.write(folder)
            write_result(result, folder)
            self._ended(spec, result)
            return
        self.at_work[self.pool.submit(self._one, spec, folder)] = spec, start
        if not isinstance(spec, TrainingSpec):
            self._settle(0)

    def _one(self, spec: Spec, folder: Path) -> Result:
        def look() -> None:
            if self.stopping.is_set():
                raise KeyboardInterrupt
            self.progress.update(spec, folder)

        shared = self.jobs > 1 and isinstance(spec, TrainingSpec)
        return run_one(spec, folder, look, max(1, usable_cores() // self.jobs) if shared else None)

    def _settle(self, most: int) -> None:
        """Wait until no more than so many runs are at work."""
        while len(self.at_work) > most:
            for future in wait(self.at_work, return_when=FIRST_COMPLETED).done:
                spec, start = self.at_work.pop(future)
                try:
                    result = future.result()
                except KeyboardInterrupt:
                    self.stopping.set()
                    result = failed_result(spec, "interrupted", start)
                self._ended(spec, result)

    def _ended(self, spec: Spec, result: Result) -> None:
        self.progress.finish(spec, result)
        self.results[spec.name] = result


def _other_commit(result: Result) -> str | None:
    """Which commit a result is of and which this is, where both are known and differ."""
    then, now = result.provenance.get("git_commit"), git_state()["git_commit"]
    return f"{then[:12]}, now {now[:12]}" if then and now and then != now else None


def run_one(spec: Spec, folder: Path, while_waiting: Callable[[], None], threads: int | None = None) -> Result:
    """Run one spec in a process of its own; everything it says goes to ``run.log``.

    Args:
        spec: what to run.
        folder: the run's.
        while_waiting: called several times a second; what it raises ends the run.
        threads: of the process; None: as many as PyTorch takes. The user's OMP_NUM_THREADS comes before it.

    Raises:
        KeyboardInterrupt: after the process has been stopped.
    """
    start = now()
    try:
        check_free(folder)
    except UserError as error:
        return failed_result(spec, str(error), start)  # not on the disk: the folder is another's
    _make_room(folder)
    spec.write(folder)
    with (folder / LOG_FILE).open("w") as log:
        # A session of its own, so that Ctrl-C reaches this process alone, which then ends the run in order.
        process = subprocess.Popen(
            [sys.executable, "-m", "evmamba.launch.bench.run", str(folder / SPEC_FILE)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=({} if threads is None else {"OMP_NUM_THREADS": str(threads)}) | os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                while_waiting()
                time.sleep(POLL_SECONDS)
        except BaseException:
            _stop(process)
            raise
    if (folder / FILE_NAME).exists():
        return read_result(folder / FILE_NAME)
    # Killed from outside, or died before Python could say anything.
    code = process.returncode
    how = f"killed by signal {-code}{' (out of memory?)' if code == -9 else ''}" if code < 0 else f"exit status {code}"
    result = failed_result(spec, f"{how}; last words: {last_words(folder)}", start)
    # Ended from outside: started again, the run goes on.
    result.provenance["interrupted"] = code < 0 or code == os.EX_TEMPFAIL  # the second: it saved and left in order
    write_result(result, folder)
    return result


def _make_room(folder: Path) -> None:
    """Remove what an earlier run left, except that an interrupted one goes on from its checkpoints, and a failed one
    with checkpoints goes to ``NAME.failed-N``, as it may be all that is left of a long training."""
    try:
        result = read_result(folder / FILE_NAME)
    except UserError:
        return  # stopped before it could say anything
    if result.provenance.get("interrupted"):
        (folder / FILE_NAME).unlink()
        return
    if not result.finished and next(folder.rglob("*.ckpt"), None):
        n = 1
        while (kept := folder.with_name(f"{folder.name}.failed-{n}")).exists():
            n += 1
        folder.rename(kept)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM (a time limit, say) end the benchmark like Ctrl-C, so that the run's process is not left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(30)  # it finishes its step and writes a checkpoint
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
