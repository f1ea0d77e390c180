"""`evmamba submit`."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import (
    add_bench_options,
    add_cluster_options,
    bench_options,
    cluster_options,
    need_extra,
)

if TYPE_CHECKING:
    from rich.console import Console

    from evmamba.launch.bench.estimate import Speed
    from evmamba.launch.cluster.settings import Cluster
    from evmamba.launch.store.spec import Spec

DESCRIPTION = """A benchmark as SLURM jobs that wait for each other, ending in one table. The options of the cluster may
also be given for one kind of run: cost, a task, evaluation, report."""

TRIALS = """These are the trials of a search. When all have ended, the same command with --resume submits the
benchmark and what they chose; --resume alone repeats trials that failed."""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba submit", description=DESCRIPTION)
    add_bench_options(parser)
    benchmark_names = {action.dest for action in parser._actions} - {"help", "output"}
    add_cluster_options(parser)
    guess = parser.add_argument_group("estimate of hours, shown by --dry-run and kept for the report")
    guess.add_argument(
        "--speed",
        metavar="SOURCE",
        help="images a second of EfficientVMamba-T's training step at 224 pixels, the JSON of `evmamba profile "
        "--training`, or results of an earlier benchmark (default: a published figure, and said so)",
    )
    guess.add_argument("--loading", type=float, metavar="N", help="images that a core loads in a second (default: 100)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print scripts and graph, submit nothing")
    how.add_argument("--local", action="store_true", help="run the same graph here, one run after the other")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="submit what failed or is missing in --output")
    again.add_argument("--rest", action="store_true", help="submit what --max-jobs held back, nothing that failed")
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console

    from evmamba.launch.bench.graph import is_trial
    from evmamba.launch.cluster import submission
    from evmamba.launch.cluster.jobs import JobBook
    from evmamba.launch.cluster.settings import read_cluster
    from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings

    quiet_warnings()
    quiet_logs()
    console = Console()
    given.output = given.output.expanduser().resolve()
    resume = given.resume or given.rest
    if given.local and resume:
        parser.error("--local goes on by itself when the same command is given again; leave out --resume")
    before = JobBook.read(given.output) if resume else None
    cluster = read_cluster(given.cluster, cluster_options(given), before.cluster if before else None)
    if given.local:
        return _run_here(given, cluster, console)
    if not given.dry_run:
        submission.check_slurm()
    speed = _given_speed(given)  # a wrong one is said before anything is submitted
    if resume and all(getattr(given, name) == parser.get_default(name) for name in benchmark_names):
        specs = submission.graph_of(given.output, cluster)
    else:
        with console.status("checking models and data"):
            specs = submission.plan_graph(bench_options(given), cluster)
        if before and before.order:
            submission.check_same(specs, given.output, before.order, bool(given.search))
    if given.dry_run:
        submission.show(specs, given.output, cluster, console)
        _estimate(given, specs, cluster, console, speed)
    else:
        submission.submit(specs, given.output, cluster, resume, console, only_new=given.rest)
        if speed is not None:
            _estimate(given, specs, cluster, console, speed, keep=True)
    if all(map(is_trial, specs)):
        console.print(TRIALS, style="dim", markup=False, highlight=False)
    return 0


def _given_speed(given: argparse.Namespace) -> "Speed | None":
    if given.speed is None and given.loading is None:
        return None
    from evmamba.launch.bench.estimate import check_rate, read_speed

    if given.loading is not None:
        check_rate("--loading", given.loading)
    return None if given.speed is None else read_speed(given.speed)


def _estimate(
    given: argparse.Namespace,
    specs: "Sequence[Spec]",
    cluster: "Cluster",
    console: "Console",
    speed: "Speed | None",
    keep: bool = False,
) -> None:
    """Print how long the trainings will take, and with `keep` leave that in their folders."""
    from evmamba.launch.bench.estimate import LOADING, estimate, print_estimates, read_speed
    from evmamba.launch.bench.graph import kind_of
    from evmamba.launch.store.spec import RUNS_FOLDER, TrainingSpec

    trainings = [spec for spec in specs if isinstance(spec, TrainingSpec)]
    if speed is None and any(spec.device == "cpu" for spec in trainings):
        console.print("no estimate: nothing is known of these processors; say it with --speed", style="dim")
        return
    speed = speed or read_speed(None)
    with console.status("counting the networks' work"):
        found = {
            spec.name: one
            for spec in trainings
            if (one := estimate(spec, speed, cluster[kind_of(spec)].cpus_per_task, given.loading or LOADING))
        }
    print_estimates(trainings, found, console)
    for name, one in found.items() if keep else ():
        one.write(given.output / RUNS_FOLDER / name)


def _run_here(given: argparse.Namespace, cluster: "Cluster", console: "Console") -> int:
    from evmamba.launch.bench.local import run_here
    from evmamba.launch.bench.progress import RunProgress
    from evmamba.launch.cluster import submission
    from evmamba.launch.report.build import show_report
    from evmamba.launch.report.table import build_table

    submission.check_alone(given.output)
    with console.status("checking models and data"):
        specs = submission.plan_here(bench_options(given), cluster)
    results, interrupted = run_here(specs, given.output, RunProgress(console, len(specs)))
    if given.search and not interrupted:
        specs = submission.plan_here(bench_options(given), cluster)  # now with what the trials chose
        results, interrupted = run_here(specs, given.output, RunProgress(console, len(specs)))
    models = list(dict.fromkeys(spec.model for spec in specs))
    show_report(build_table(results, models), given.output, console)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if all(result.finished for result in results) else 1
