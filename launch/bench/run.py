"""One run: ``python -m evmamba.launch.bench.run FOLDER/spec.json``, alone, or as one of many processes.

Fits and tests what the spec names, or measures the cost of a bare backbone, and leaves ``result.json`` beside the spec,
also when it fails. Exit status: 0 finished, 1 failed, 75 stopped by a signal: started again, it continues. While it
works, ``progress.json`` says how far it is. Of several processes the first writes all this; a failure is told by the
process that failed first.
"""

import datetime
import sys
import traceback
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.files import write_errors
from evmamba.launch.fit.failures import is_machines, reported_once
from evmamba.launch.fit.held_signals import deliver_signals, hold_signals
from evmamba.launch.fit.launchers import node_name, process_rank
from evmamba.launch.fit.light_imports import import_lightly
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
from evmamba.launch.store.progress import write_progress
from evmamba.launch.store.results import FILE_NAME, now, read_result, write_result
from evmamba.launch.store.spec import (
    LOG_FILE,
    CostSpec,
    EvaluationSpec,
    Spec,
    TrainingSpec,
    failed_result,
    finished_before,
    read_spec,
    reason_of,
    why_not_started,
)
from evmamba.tasks.training.lease import claim, is_ours, release, start_of


def run(spec: Spec, folder: Path) -> None:
    """Run a spec and write its result.

    Raises:
        UserError, or whatever went wrong; no result is written then (`main` does).
    """
    if process_rank() == 0:  # before the libraries, which take seconds
        write_progress(folder, "measuring" if isinstance(spec, CostSpec) else "preparing")
    if isinstance(spec, CostSpec):
        from evmamba.launch.measure.cost import measure_cost

        measure_cost(spec, folder)
    else:
        from evmamba.launch.fit.training import evaluate, fit_and_test

        evaluate(spec, folder) if isinstance(spec, EvaluationSpec) else fit_and_test(spec, folder)


def _may_tell(spec: Spec, folder: Path) -> bool:
    """Whether this process's failure is the run's: a later start may be at work in the folder, or have finished.

    And whether no other process of this start has failed yet: the ones after it only tell that they lost it.
    """
    if not is_ours(folder) or finished_before(spec, folder):
        return False
    name = start_of()
    if name is None:
        return True
    with write_errors(folder):
        try:
            (folder / f".failed-{name}").touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def main(argv: list[str] | None = None) -> int:
    arguments: list[Any] = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m evmamba.launch.bench.run FOLDER/spec.json", file=sys.stderr)
        return 2
    hold_signals()
    import_lightly()
    try:
        return _start(Path(arguments[0]))
    finally:
        try:
            deliver_signals()  # raises where one waits
        finally:
            release()


def _start(path: Path) -> int:
    """Read the spec, claim its folder, and run it."""
    try:
        spec, folder = read_spec(path), path.parent
    except UserError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 2
    start = now()
    quiet_warnings()
    quiet_logs()
    from evmamba.launch.fit.signals import ignore_time_limit, requeue_on_signals

    if isinstance(spec, TrainingSpec):
        requeue_on_signals()
    else:
        ignore_time_limit()
    try:
        if process_rank() == 0:
            lease = claim(folder)
            if not isinstance(spec, TrainingSpec):
                lease.advance()
    except UserError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    deliver_signals()
    return _finish(spec, folder, start)


def _finish(spec: Spec, folder: Path, start: datetime.datetime) -> int:
    """Run the spec; if it fails, leave a result that says why."""
    who = f"process {process_rank()} on {node_name()}" if spec.resources.processes > 1 else ""
    blocked_by, goes_on = None, False
    try:
        with reported_once():
            lacking = _lacking(spec, folder)
            if lacking is not None:
                blocked_by, reason = lacking
                raise UserError(reason)
            run(spec, folder)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        reason, goes_on = reason_of(error), is_machines(error)
    except Exception as error:
        # The log keeps the whole story, the table its first line.
        print(f"{who} failed:\n{traceback.format_exc()}" if who else traceback.format_exc(), file=sys.stderr, end="")
        where = f"{who}, " if who else ""
        reason = f"{reason_of(error)} ({where}see {folder / LOG_FILE})"
    else:
        return 0
    print(f"failed: {reason}", file=sys.stderr, flush=True)
    try:
        if _may_tell(spec, folder):
            result = failed_result(spec, reason, start, blocked_by)
            if goes_on:
                result.provenance["interrupted"] = True
            write_result(result, folder)
    except UserError as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)  # the log is all there is then
    return 1


def _lacking(spec: Spec, folder: Path) -> tuple[str, str] | None:
    """What `why_not_started` says of a run that needs one which is not finished; None where it can start.

    Schedulers start jobs after others, but the next job of a chain also starts when the run's need has failed.
    """
    for name in () if isinstance(spec, CostSpec) else spec.needs:
        try:
            needed = read_result(folder.parent / name / FILE_NAME)
        except UserError:
            return why_not_started(name, "it left no result", None)
        if not needed.finished:
            return why_not_started(name, needed.reason or "", needed.blocked_by)
    return None


if __name__ == "__main__":
    sys.exit(main())
