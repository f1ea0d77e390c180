"""`evmamba consolidate`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba consolidate",
        description="Make one file of a sharded checkpoint, a folder that ZeRO or FSDP2 wrote.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="e.g. runs/NAME/checkpoints/last.ckpt")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="*.safetensors: weights alone, for --model.init_args.checkpoint; *.ckpt: for test --ckpt_path too "
        "(default: NAME.consolidated.ckpt beside the folder)",
    )
    given = parser.parse_args(arguments)
    need_extra()

    from evmamba.launch.fit.checkpoint_folders import consolidate

    print(consolidate(given.folder, given.output))
    return 0
