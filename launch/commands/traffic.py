"""`evmamba traffic`."""

from collections.abc import Sequence

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import names, need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba traffic",
        description="Bytes, kernels and peak memory of a network's steps on a GPU, counted from shapes without one: "
        "inference and training, with activation checkpointing, and with the published code's scan. "
        "Counted, not measured: a floor of the memory's traffic, without cuDNN's workspaces.",
    )
    parser.add_argument("--backbones", default="efficientvmamba_t", help="ours or timm's (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images of a step (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=224, help="side of the images (default: %(default)s)")
    parser.add_argument(
        "--precision", default="bf16-mixed", help="32-true, bf16-mixed or 16-mixed (default: %(default)s)"
    )
    parser.add_argument("--operators", type=int, default=0, metavar="N", help="also the N kinds that move most bytes")
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console
    from rich.table import Table

    from evmamba.launch.measure.traffic import count_ways
    from evmamba.launch.store.precision import autocast_to
    from evmamba.tasks.backbones import build_backbone

    console, amp = Console(), autocast_to(given.precision)
    image = (given.batch_size, 3, given.resolution, given.resolution)
    for name in names(given.backbones):
        model = build_backbone(name, features_only=False, num_classes=1000)
        table = Table("step", "kernels", "GB moved", "peak GB", "GB kept for the backward", box=None)
        for way, traffic in count_ways(model, image, amp):
            peak, saved = (f"{value / 1e9:.2f}" if value else "" for value in (traffic.peak, traffic.saved))
            table.add_row(way, str(traffic.kernels), f"{traffic.bytes / 1e9:.2f}", peak, saved)
            largest = sorted(traffic.by_kind.items(), key=lambda item: -item[1][1])[: given.operators]
            for kind, (kernels, moved) in largest:
                table.add_row(f"  {kind}", str(kernels), f"{moved / 1e9:.2f}", style="dim")
        console.print(f"{name}, batch {given.batch_size}, {given.resolution}x{given.resolution}, {given.precision}")
        console.print(table)
    return 0
