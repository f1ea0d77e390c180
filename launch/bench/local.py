"""Running a benchmark here: one process a run, one after the other.

`run_here` leaves out what is finished already, and goes on after a failure.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
    failed_result,
    finished_before,
    result_before,
    why_not_started,
)
from evmamba.tasks.training.lease import check_free

POLL_SECONDS = 0.2


def run_here(
    specs: Sequence[Spec], output: Path, progress: RunProgress, force: bool = False
) -> tuple[list[Result], bool]:
    """Run specs one after the other and return one result each, and whether Ctrl-C ended it before its time.

    A finished run with the same spec is not repeated. A failed run is a result like any other; runs that need it are
    not started, which is their reason. After Ctrl-C the run at work is stopped, finished ones stay, and what is missing
    is "failed: interrupted" in what is returned (not on disk).
    """
    results: list[Result] = []
    failed: dict[str, Result] = {}
    started: set[str] = set()
    interrupted = False
    elsewhere: str | None = None
    with _terminated_is_interrupted(), progress:
        for spec in specs:
            folder = output / RUNS_FOLDER / spec.name
            # The first of a table's networks has just measured this one too.
            measured = isinstance(spec, CostSpec) and not started.isdisjoint(spec.needs)
            previous = finished_before(spec, folder) if measured or not force else None
            if previous is not None:
                progress.skip(spec, "measured in turns" if measured else "finished before")
                elsewhere = elsewhere or _other_commit(previous)
                results.append(previous)
                continue
            start = now()
            if interrupted:
                results.append(failed_result(spec, "interrupted", start))
                continue
            if measured and (result := result_before(spec, folder)) is not None:
                failed[spec.name] = result
                progress.finish(spec, result)
                results.append(result)
                continue
            progress.start(spec)
            started.add(spec.name)
            lacking = next((failed[name] for name in spec.needs if name in failed), None)
            try:
                if lacking is not None:
                    blocked_by, reason = why_not_started(lacking.run, lacking.reason or "", lacking.blocked_by)
                    result = failed_result(spec, reason, start, blocked_by)
                    spec.write(folder)
                    write_result(result, folder)
                else:
                    result = run_one(spec, folder, functools.partial(progress.update, folder))
            except KeyboardInterrupt:
                interrupted = True
                result = failed_result(spec, "interrupted", start)
            if not result.finished:
                failed[spec.name] = result
            progress.finish(spec, result)
            results.append(result)
        if elsewhere:
            progress.remark(f"finished runs of another commit were taken over ({elsewhere}); --force repeats them")
    return results, interrupted


def _other_commit(result: Result) -> str | None:
    """Which commit a result is of and which this is, where both are known and differ."""
    then, now = result.provenance.get("git_commit"), git_state()["git_commit"]
    return f"{then[:12]}, now {now[:12]}" if then and now and then != now else None


def run_one(spec: Spec, folder: Path, while_waiting: Callable[[], None]) -> Result:
    """Run one spec in a process of its own; everything it says goes to ``run.log``.

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
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
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
