"""`evmamba data`."""

from collections.abc import Sequence

from evmamba.launch.commands.shared import need_extra
from evmamba.launch.messages import Parser


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba data", description="Make the embedded data sets and say where they are.")
    parser.add_argument("what", choices=["embedded"])
    parser.parse_args(arguments)
    need_extra()

    from evmamba.tasks.embedded import ensure_embedded

    for task in ("classification", "detection", "segmentation"):
        print(f"{task:15} {ensure_embedded(task)}")
    return 0
