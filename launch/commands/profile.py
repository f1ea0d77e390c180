"""`evmamba profile`: whole networks, or (`--input`) what feeds them."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evmamba.errors import UserError
from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import names, need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba profile",
        description="Latency, throughput, memory and energy of whole networks, measured side by side. "
        "Options with commas are swept, all with all.",
    )
    parser.add_argument("--backbones", default="efficientvmamba_t", help="ours or timm's; ratios refer to the first")
    parser.add_argument("--resolutions", default="224", help="sides, or HEIGHTxWIDTH (default: %(default)s)")
    parser.add_argument(
        "--batch-sizes", default="1", help="1,4,16; a last 'max' doubles on until memory ends (default: %(default)s)"
    )
    parser.add_argument("--modes", default="eager", help="eager, fused, compiled, graph (default: %(default)s)")
    parser.add_argument("--training", action="store_true", help="training steps beside inference")
    parser.add_argument("--precisions", default="float32", help="float32, bfloat16, float16 (default: %(default)s)")
    parser.add_argument("--layouts", default="contiguous", help="contiguous, channels_last (default: %(default)s)")
    parser.add_argument("--pyramid", action="store_true", help="feature pyramids in place of classifiers")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="also the N slowest operators, and parts")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for one row (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("profile"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--input", metavar="RECIPE", help="in place of networks: how fast a recipe's training images come"
    )
    parser.add_argument("--data-dir", metavar="DIR", help="of --input: the data (default: the recipe's)")
    parser.add_argument(
        "--rate", type=float, metavar="N", help="of --input: images/s that a device takes, to count cores"
    )
    given = parser.parse_args(arguments)
    need_extra()
    if given.input is not None:
        return _profile_input(given)
    for option in ("data_dir", "rate"):
        if getattr(given, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} belongs to --input RECIPE")

    from rich.console import Console

    from evmamba.launch.measure import profiling
    from evmamba.launch.measure.profile_parts import shares
    from evmamba.launch.measure.profile_report import print_profile, write_profile
    from evmamba.launch.store.devices import choose_device
    from evmamba.launch.store.results import check_writable

    check_writable(given.output, "--output")
    batch_sizes = names(given.batch_sizes)
    until_memory_ends = batch_sizes[-1:] == ["max"]
    options = profiling.ProfileOptions(
        backbones=names(given.backbones),
        resolutions=[_resolution(text) for text in names(given.resolutions)],
        batch_sizes=[_integer("--batch-sizes", text) for text in batch_sizes[: -1 if until_memory_ends else None]]
        or [1],
        until_memory_ends=until_memory_ends,
        modes=names(given.modes),
        phases=["inference", "training"] if given.training else ["inference"],
        precisions=names(given.precisions),
        layouts=names(given.layouts),
        device=choose_device(given.device),
        pyramid=given.pyramid,
        seconds=given.seconds,
        operators=given.operators,
    )
    console = Console()
    about = profiling.about(options.device) | {"command": shlex.join(["evmamba", "profile", *arguments])}
    with console.status("building the networks") as status:
        rows = profiling.profile(options, status.update)
        parts = shares(options) if options.operators else []
    written = write_profile(rows, parts, about, given.output)  # first: a terminal's reader may go away
    print_profile(rows, parts, about, console)
    console.print("\n" + "  ".join(map(str, written)), style="dim", markup=False, highlight=False, soft_wrap=True)
    return 0 if any(row.reason is None for row in rows) else 1


def _profile_input(given: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from evmamba.launch.fit.cli import EvmambaCLI
    from evmamba.launch.measure.input import measure_input
    from evmamba.launch.store.devices import choose_device
    from evmamba.launch.store.results import check_writable, write_json

    if given.rate is not None and given.rate <= 0:
        raise UserError(f"--rate is images a second, above 0, not {given.rate:g}")
    check_writable(given.output, "--output")
    where = [] if given.data_dir is None else ["--data.data_dir", given.data_dir]
    data = EvmambaCLI(["--config", given.input, *where], run=False).datamodule
    device = choose_device(given.device)
    console = Console()
    with console.status("loading images"):
        rate = measure_input(data, given.seconds, device)
    written = given.output / "input.json"
    write_json(written, asdict(rate) | {"recipe": given.input, "data": data.description()})
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("stage", no_wrap=True)
    for name in ("ms of a core", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage, share in rate.shares.items():
        table.add_row(stage, f"{rate.milliseconds(stage):.2f}", f"{share:.0%}")
    console.print(table)
    console.print(f"{rate.per_core:.0f} images a second and core, of {data.root}")
    console.print(
        f"{rate.loader:.0f} images a second by the recipe's loader with {rate.workers} processes on this machine"
    )
    if rate.on_device is not None:
        console.print(f"{rate.on_device:.0f} images a second decoded and augmented on {device}")
    if given.rate is not None:
        console.print(
            f"a device that takes {given.rate:g} images a second needs {rate.cores_for(given.rate):.1f} such cores"
        )
    console.print(f"\n{written}", style="dim", highlight=False, soft_wrap=True)
    return 0


def _resolution(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    side = _integer("--resolutions", height)
    return side, _integer("--resolutions", width) if width else side


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{option}: '{text}' is not a number") from None
