"""`evmamba predict IMAGE_OR_FOLDER ... --checkpoint FILE`; with a recipe it is Lightning's (see training.py)."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra


def shows_images(arguments: Sequence[str]) -> bool:
    """Whether `evmamba predict` was given images or a checkpoint, not a recipe."""
    return bool(arguments) and (
        not arguments[0].startswith("-") or any(a.partition("=")[0] == "--checkpoint" for a in arguments)
    )


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba predict", description="What a trained network sees in images of yours.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="files, or folders of them")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="best.ckpt or last.ckpt")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--min-score", type=float, default=0.3, help="of detections (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console

    from evmamba.launch.store.devices import choose_device
    from evmamba.launch.use.predict_images import load_predictor, predict_images

    predictor = load_predictor(given.checkpoint, choose_device(given.device))
    unreadable = predict_images(predictor, given.images, given.output, given.min_score, Console())
    return 1 if unreadable else 0
