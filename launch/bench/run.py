"""One run: ``python -m evmamba.launch.bench.run FOLDER/spec.json``, alone, or as one of many processes.

Fits and tests what the spec names, or measures the cost of a bare backbone, and leaves ``result.json`` beside the spec,
also when it fails. Exit status: 0 finished, 1 failed, 75 stopped by a signal: started again, it continues. While it
works, ``progress.json`` says how far it is. Of several processes the first writes all this; a failure is told by the
process that failed first.
"""

import datetime
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.launch.fit.failures import reported_once
from evmamba.launch.fit.launchers import node_name, process_rank
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
from evmamba.launch.store.progress import write_progress
from evmamba.launch.store.results import write_result
from evmamba.launch.store.spec import (
    LOG_FILE,
    CostSpec,
    EvaluationSpec,
    Spec,
    TrainingSpec,
    failed_result,
    read_spec,
    reason_of,
)
from evmamba.tasks.training import slurm_job


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


def attempt() -> str | None:
    """What tells one start of a run's processes from the next: SLURM's job and its number of restarts, or torchrun's;
    None where one process is all there is."""
    if job := slurm_job.job_id():
        return f"{job}.{slurm_job.restarts()}"
    if name := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"{name}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return None


def _first_to_fail(folder: Path) -> bool:
    """Whether no other process of this start has failed yet: the ones after it only tell that they lost it."""
    name = attempt()
    if name is None:
        return True
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
    path = Path(arguments[0])
    try:
        spec, folder = read_spec(path), path.parent
    except UserError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 2
    start = datetime.datetime.now(datetime.UTC)
    quiet_warnings()
    quiet_logs()
    from evmamba.launch.fit.signals import ignore_time_limit, requeue_on_signals

    if isinstance(spec, TrainingSpec):
        requeue_on_signals()
    else:
        ignore_time_limit()
    who = f"process {process_rank()} on {node_name()}" if spec.resources.processes > 1 else ""
    try:
        with reported_once():
            run(spec, folder)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        reason = reason_of(error)
    except Exception as error:
        # The log keeps the whole story, the table its first line.
        print(f"{who} failed:\n{traceback.format_exc()}" if who else traceback.format_exc(), file=sys.stderr, end="")
        where = f"{who}, " if who else ""
        reason = f"{reason_of(error)} ({where}see {folder / LOG_FILE})"
    else:
        return 0
    print(f"failed: {reason}", file=sys.stderr, flush=True)
    if _first_to_fail(folder):
        write_result(failed_result(spec, reason, start), folder)
    return 1


if __name__ == "__main__":
    sys.exit(main())
