"""`evmamba profile`."""

import shlex
from collections.abc import Sequence
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
    parser.add_argument("--modes", default="eager", help="eager, compiled, graph (default: %(default)s)")
    parser.add_argument("--training", action="store_true", help="training steps beside inference")
    parser.add_argument("--precisions", default="float32", help="float32, bfloat16, float16 (default: %(default)s)")
    parser.add_argument("--layouts", default="contiguous", help="contiguous, channels_last (default: %(default)s)")
    parser.add_argument("--pyramid", action="store_true", help="feature pyramids in place of classifiers")
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="also the N slowest operators, and parts")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for one row (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("profile"), metavar="DIR", help="default: %(default)s")
    given = parser.parse_args(arguments)
    need_extra()

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
    print_profile(rows, parts, about, console)
    written = write_profile(rows, parts, about, given.output)
    console.print("\n" + "  ".join(map(str, written)), style="dim", highlight=False, soft_wrap=True)
    return 0 if any(row.reason is None for row in rows) else 1


def _resolution(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    side = _integer("--resolutions", height)
    return side, _integer("--resolutions", width) if width else side


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{option}: '{text}' is not a number") from None
