"""`evmamba bench`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.shared import names, need_extra
from evmamba.launch.messages import Parser


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba bench", description="Train briefly, evaluate, measure cost; one table of it all.")
    parser.add_argument("--backbones", default="efficientvmamba_t", help="names, with commas (default: %(default)s)")
    for task in ("classification", "detection", "segmentation"):
        parser.add_argument(f"--{task}", metavar="DIR", help=f"data folder for {task}")
    parser.add_argument("--tasks", help="which tasks, with commas (default: those with a folder, else all, embedded)")
    parser.add_argument(
        "--detectors", default="retinanet", help="retinanet, maskrcnn, fasterrcnn (default: %(default)s)"
    )
    parser.add_argument("--preset", help="tiny, small or paper (default: small with a data folder, tiny without)")
    parser.add_argument("--output", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--precision",
        help="Lightning's name, e.g. 32-true, bf16-mixed (default: bf16-mixed on a GPU, else the recipe's)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[TASK.]OPTION=VALUE",
        help="override a recipe, e.g. trainer.max_epochs=3 or detection.data.init_args.batch_size=4; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="repeat finished runs too")
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console

    from evmamba.launch import benchmark
    from evmamba.launch.progress import RunProgress
    from evmamba.launch.quiet import quiet_logs, quiet_warnings
    from evmamba.launch.report import print_table, write_report
    from evmamba.launch.table import build_table

    quiet_warnings()
    quiet_logs()
    options = benchmark.BenchOptions(
        output=given.output,
        backbones=names(given.backbones),
        tasks=names(given.tasks) if given.tasks is not None else None,
        data={task: folder for task in benchmark.TASKS if (folder := getattr(given, task)) is not None},
        detectors=names(given.detectors),
        preset=given.preset,
        seed=given.seed,
        device=given.device,
        precision=given.precision,
        overrides=given.set,
        force=given.force,
    )
    console = Console()
    with console.status("checking models and data"):
        specs = benchmark.plan(options)
    results, interrupted = benchmark.run_here(specs, options.output, RunProgress(console, len(specs)), options.force)
    table = build_table(results, models=list(dict.fromkeys(options.backbones)))
    print_table(table, console)
    written = write_report(table, options.output)
    console.print("\n" + "  ".join(map(str, written)), style="dim", highlight=False, soft_wrap=True)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if all(result.finished for result in results) else 1
