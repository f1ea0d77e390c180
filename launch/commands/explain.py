"""`evmamba explain`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba explain",
        description="Pictures of what a network does with an image: scan paths, step sizes of the scans, effective "
        "receptive field, class activation.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE_OR_FOLDER",
        help="the first one is drawn; the receptive field is the mean over all",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="best.ckpt or last.ckpt")
    parser.add_argument("--backbone", metavar="NAME", help="a backbone by name instead, e.g. to see it untrained")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights for --backbone")
    parser.add_argument("--class", dest="label", metavar="NAME", help="of the activation (default: the most probable)")
    parser.add_argument("--size", type=int, help="side of the network's input in pixels (default: the training's)")
    parser.add_argument("--output", type=Path, default=Path("explained"), metavar="DIR", help="default: %(default)s")
    given = parser.parse_args(arguments)
    need_extra()

    from evmamba.launch.use.explain_images import explain_images

    for path in explain_images(given):
        print(path)
    return 0
