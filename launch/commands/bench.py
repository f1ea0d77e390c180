"""`evmamba bench`."""

from collections.abc import Sequence

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import add_bench_options, bench_options, need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba bench", description="Train briefly, evaluate, measure cost; one table of it all.")
    add_bench_options(parser)
    parser.add_argument("--force", action="store_true", help="repeat finished runs too")
    parser.add_argument("--strategy", help="ddp, deepspeed_stage_2, fsdp2 ... for the trainings (default: none)")
    given = parser.parse_args(arguments)
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
    results, interrupted = run_here(specs, options.output, RunProgress(console, len(specs)), options.force)
    if options.search and not interrupted:
        specs = plan(options)  # now with what the trials chose
        if options.exported:
            specs = with_exported(specs)
        results, interrupted = run_here(specs, options.output, RunProgress(console, len(specs)))
    show_report(build_table(results, models=backbones_of(options)), options.output, console)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if all(result.finished for result in results) else 1
