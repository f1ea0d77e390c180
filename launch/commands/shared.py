"""What several subcommands need."""

import argparse
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from evmamba.errors import UserError
from evmamba.launch.messages import Parser

if TYPE_CHECKING:
    from evmamba.launch.benchmark import BenchOptions


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


def bench_options(given: argparse.Namespace) -> "BenchOptions":
    from evmamba.launch import benchmark

    return benchmark.BenchOptions(
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
    )
