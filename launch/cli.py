"""The `evmamba` command. Each subcommand is a thin call; heavy libraries are imported only by those that need them."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from evmamba.errors import UserError, unknown_name
from evmamba.launch.messages import Parser

TRAINING = {
    "fit": "train",
    "validate": "evaluate on the validation data",
    "test": "evaluate and write result.json",
    "predict": "predict the validation data",
}
TRAINING_HELP = """\
usage: evmamba {command} --config RECIPE [--option value ...]

{what}, by Lightning's command line: every argument of the trainer, the model and the data is an option.

  --config conf/detection/tiny.yaml        a recipe: a file, or one of the package (listed below)
  --data.init_args.data_dir DIR            the data set; the layouts are in docs/data.md
  --model.init_args.backbone NAME          one of ours or timm's (evmamba models)
  --trainer.max_epochs N                   and all of Lightning's Trainer
  --ckpt_path FILE                         weights to test, or training to continue
  --print_config                           the whole configuration, to look at or to keep

recipes:
  {recipes}

all options: evmamba {command} --config RECIPE --print_config"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 good, 1 a run failed, 2 the user can mend it, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"evmamba: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evmamba: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (evmamba models | head): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    commands = {"bench": _bench, "report": _report, "models": _models, "data": _data}
    parser = _parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    command = arguments[0]
    if command == "--version":
        print(f"evmamba {metadata.version('evmamba')}")
        return 0
    if command in TRAINING:
        return _train(command, arguments[1:])
    if command not in commands:
        kind = "option" if command.startswith("-") else "command"
        raise unknown_name(kind, command, [*TRAINING, *commands] if kind == "command" else ["--help", "--version"])
    return commands[command](arguments[1:])


def _parser() -> argparse.ArgumentParser:
    trainings = "\n".join(f"  {name:10}{what}" for name, what in TRAINING.items())
    return argparse.ArgumentParser(
        prog="evmamba",
        usage="evmamba COMMAND [options]",
        description="EfficientVMamba: train it, measure it, compare it on three tasks.",
        epilog=f"""\
commands:
  bench     train briefly, evaluate, measure; ends in one table
  report    the table again, from any result files
{trainings}
  models    list backbones
  data      make the embedded data sets

evmamba COMMAND --help says more. --version prints the version.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )


def _train(command: str, arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from evmamba.launch.recipes import recipes

        text = TRAINING_HELP.format(command=command, what=TRAINING[command], recipes="\n  ".join(recipes()))
        print(text)
        return 0 if arguments else 2
    _need_extra()
    from evmamba.launch.train import train

    train([command, *arguments])
    return 0


def _bench(arguments: list[str]) -> int:
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
    _need_extra()

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
        backbones=_names(given.backbones),
        tasks=_names(given.tasks) if given.tasks is not None else None,
        data={task: folder for task in benchmark.TASKS if (folder := getattr(given, task)) is not None},
        detectors=_names(given.detectors),
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


def _report(arguments: list[str]) -> int:
    parser = Parser(prog="evmamba report", description="One table of any result files.")
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="result files, or folders that hold them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where report.* go (default: the first DIR)")
    given = parser.parse_args(arguments)
    _need_extra()

    from rich.console import Console

    from evmamba.launch.report import print_table, report_from, write_report

    table = report_from(given.results)
    console = Console()
    print_table(table, console)
    first: Path = given.results[0]
    written = write_report(table, given.output or (first if first.is_dir() else first.parent))
    console.print("\n" + "  ".join(map(str, written)), style="dim", highlight=False, soft_wrap=True)
    return 0


def _models(arguments: list[str]) -> int:
    parser = Parser(prog="evmamba models", description="List backbones: ours, then timm's whose name matches.")
    parser.add_argument("filter", nargs="?", help="pattern of timm's names, e.g. 'resnet*'")
    given = parser.parse_args(arguments)

    import timm

    import evmamba

    ours = evmamba.list_models()
    others = [name for name in timm.list_models(given.filter) if name not in ours] if given.filter else []
    if given.filter and not others:
        raise unknown_name("backbone", given.filter, [*ours, *timm.list_models()])
    print("\n".join(others or ours))
    if not given.filter:
        print(f"and {len(timm.list_models()) - len(ours)} of timm: evmamba models 'resnet*'")
    return 0


def _data(arguments: list[str]) -> int:
    parser = Parser(prog="evmamba data", description="Make the embedded data sets and say where they are.")
    parser.add_argument("what", choices=["embedded"])
    parser.parse_args(arguments)
    _need_extra()

    from evmamba.tasks.embedded import ensure_embedded

    for task in ("classification", "detection", "segmentation"):
        print(f"{task:15} {ensure_embedded(task)}")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _need_extra() -> None:
    """The training libraries are an extra; without them say so before an ImportError does."""
    try:
        metadata.version("lightning")
    except metadata.PackageNotFoundError:
        raise UserError(
            "training and reports need more libraries; in evmamba's folder: pip install '.[tasks]'"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
