"""What several subcommands need."""

import argparse
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from evmamba.errors import UserError
from evmamba.launch.commands.parser import Parser
from evmamba.tasks import TASKS, Task

if TYPE_CHECKING:
    from evmamba.launch.bench.plan import BenchOptions


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def need_extra() -> None:
    """The training libraries are an extra; without them say so before an ImportError does."""
    try:
        metadata.version("lightning")
    except metadata.PackageNotFoundError:
        raise UserError(
            "training and reports need more libraries; in evmamba's folder: pip install '.[tasks]'"
        ) from None


def add_bench_options(parser: Parser) -> None:
    """The options that say what a benchmark is made of, wherever it runs; `bench_options` reads them."""
    parser.add_argument(
        "--suite", help="main, peers, ablations, resolution or paper: a comparison that says what is not given here"
    )
    parser.add_argument("--backbones", help="names, with commas (default: efficientvmamba_t, or the suite's)")
    for task in TASKS:
        parser.add_argument(f"--{task}", metavar="DIR", help=f"data folder for {task}")
    parser.add_argument("--tasks", help="which tasks, with commas (default: those with a folder, else all, embedded)")
    for option, record in _head_options().items():
        keys = ", ".join(head.key for head in record.heads)
        parser.add_argument(
            f"--{option}", help=f"with commas: {keys} (default: {record.default_head.key}, or the suite's)"
        )
    parser.add_argument(
        "--preset", help="tiny, small, finetune or paper (default: small with a data folder, tiny without)"
    )
    parser.add_argument("--output", type=Path, default=Path("bench"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--seeds", "--seed", default="0", help="with commas: every training once with each (default: %(default)s)"
    )
    parser.add_argument(
        "--search",
        type=int,
        default=0,
        metavar="N",
        help="also every network's own best of N trials (learning rate, decay, drop path) on held-out training images",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--precision",
        help="Lightning's name, e.g. 32-true, bf16-mixed (default: bf16-mixed on a GPU, else the recipe's)",
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="start every training from the weights published for its backbone"
    )
    parser.add_argument(
        "--exported",
        action="store_true",
        help="test trained networks as ONNX files too, float32 and INT8: accuracy, size and latency in onnxruntime",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[TASK.]OPTION=VALUE",
        help="override a recipe, e.g. trainer.max_epochs=3 or detection.data.init_args.batch_size=4; may be repeated",
    )


def _numbers(text: str, option: str) -> list[int]:
    if not all(name.isdecimal() for name in names(text)):
        raise UserError(f"{option} {text}: write whole numbers with commas between them, e.g. {option} 0,1,2")
    return [int(name) for name in names(text)]


def _head_options() -> dict[str, Task]:
    """Options that choose heads (``detectors``) -> the task that has them."""
    return {f"{task.head_option}s": task for task in TASKS.values() if task.head_option}


def bench_options(given: argparse.Namespace) -> "BenchOptions":
    from evmamba.launch.bench.plan import BenchOptions

    return BenchOptions(
        output=given.output,
        suite=given.suite,
        backbones=names(given.backbones) if given.backbones is not None else None,
        tasks=names(given.tasks) if given.tasks is not None else None,
        data={task: folder for task in TASKS if (folder := getattr(given, task)) is not None},
        heads={
            task.name: names(value)
            for option, task in _head_options().items()
            if (value := getattr(given, option)) is not None
        },
        preset=given.preset,
        seeds=_numbers(given.seeds, "--seeds"),
        device=given.device,
        precision=given.precision,
        pretrained=given.pretrained,
        exported=given.exported,
        overrides=given.set,
        search=given.search,
    )
