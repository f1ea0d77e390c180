"""`evmamba bench`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evmamba.errors import UserError
from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import add_bench_options, bench_options, need_extra

if TYPE_CHECKING:
    from evmamba.launch.bench.plan import BenchOptions
    from evmamba.launch.store.spec import Spec


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba bench", description="Train briefly, evaluate, measure cost; one table of it all.")
    add_bench_options(parser)
    parser.add_argument("--force", action="store_true", help="repeat finished runs too")
    parser.add_argument("--strategy", help="ddp, deepspeed_stage_2, fsdp2 ... for the trainings (default: none)")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="trainings side by side on a CPU, each with its share of the cores (default: 1; one more than cores with "
        "embedded data)",
    )
    given = parser.parse_args(arguments)
    if given.jobs is not None and given.jobs < 1:
        raise UserError(f"--jobs {given.jobs} is not a whole number above 0")
    need_extra()

    from rich.console import Console

    from evmamba.launch.bench.graph import build_graph, with_exported
    from evmamba.launch.bench.local import run_here
    from evmamba.launch.bench.plan import backbones_of, plan, preset_of
    from evmamba.launch.bench.progress import RunProgress
    from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
    from evmamba.launch.report.build import show_report
    from evmamba.launch.report.table import build_table
    from evmamba.launch.store.spec import Resources
    from evmamba.tasks import TASKS

    quiet_warnings()
    quiet_logs()
    options = bench_options(given)
    options.force = given.force
    if given.strategy is not None:
        options.overrides = [*options.overrides, f"trainer.strategy={given.strategy}"]
    console = Console()
    with console.status("checking models and data"):
        specs = plan(options)
        if any(preset_of(options, task) == "paper" for task in TASKS):
            # The paper's detectors and segmentors start from its classifiers.
            specs = build_graph(specs, lambda kind: Resources())
        if options.exported:
            specs = with_exported(specs)
    jobs = _jobs(given.jobs, options, specs)
    results, interrupted = run_here(specs, options.output, RunProgress(console, len(specs)), options.force, jobs)
    if options.search and not interrupted:
        specs = plan(options)  # now with what the trials chose
        if options.exported:
            specs = with_exported(specs)
        jobs = _jobs(given.jobs, options, specs)
        results, interrupted = run_here(specs, options.output, RunProgress(console, len(specs)), jobs=jobs)
    show_report(build_table(results, models=backbones_of(options)), options.output, console)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if all(result.finished for result in results) else 1


def _jobs(given: int | None, options: "BenchOptions", specs: "Sequence[Spec]") -> int:
    """How many trainings run side by side.

    Raises:
        UserError: several, and they are not for a CPU.
    """
    from evmamba.launch.bench.plan import preset_of
    from evmamba.launch.store.spec import TrainingSpec
    from evmamba.processor import usable_cores

    trainings = [spec for spec in specs if isinstance(spec, TrainingSpec)]
    on_cpu = all(spec.device == "cpu" for spec in trainings)
    if given is not None and given > 1 and not on_cpu:
        raise UserError(f"--jobs {given}: on GPUs a training takes all of them; side by side is for --device cpu")
    tiny = on_cpu and all(preset_of(options, spec.task) == "tiny" for spec in trainings)
    return max(1, min(given or (usable_cores() + 1 if tiny else 1), len(trainings)))
