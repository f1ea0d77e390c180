"""`evmamba export`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.errors import UserError, unknown_name
from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra

SUFFIXES = (".onnx", ".pt2", ".safetensors")


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba export",
        description="Write a network for other programs: ONNX (batch, height and width stay dynamic; compared with "
        "PyTorch before the file is there), a torch.export program, or its weights as safetensors.",
    )
    parser.add_argument("source", metavar="CHECKPOINT_OR_NAME", help="best.ckpt, or a backbone's name")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE", help="*.onnx, *.pt2, *.safetensors")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights for a backbone given by its name")
    parser.add_argument("--backbone", action="store_true", help="the feature pyramid alone")
    parser.add_argument(
        "--fixed-size",
        metavar="HxW",
        help="for one image of this size, e.g. 224x224: a graph without Scan, Loop and If, for runtimes that lack them",
    )
    given = parser.parse_args(arguments)
    suffix = given.output.suffix
    if suffix not in SUFFIXES:
        raise unknown_name("file format", suffix or str(given.output), SUFFIXES)
    size = None if given.fixed_size is None else _size(given.fixed_size)
    if size and suffix == SUFFIXES[-1]:
        raise UserError(f"{suffix} holds weights, which are for any size; leave --fixed-size out")
    if not given.output.parent.is_dir():
        raise UserError(f"there is no folder {given.output.parent} to write to (--output)")
    need_extra()

    from rich.console import Console

    from evmamba.launch.use.export import write_network
    from evmamba.launch.use.networks import find_network

    console = Console()
    network = find_network(given.source, given.weights, given.backbone)
    with console.status(f"exporting {given.source}"):
        remark = write_network(network, given.output, size)
    console.print(f"{given.output}: {remark}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= 32):
        raise UserError(f"--fixed-size {text}: write height x width from 32 pixels up, e.g. 224x224")
    return int(height), int(width)
