"""`evmamba pull`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba pull", description="Fetch a network that was pushed, as safetensors that evmamba reads."
    )
    parser.add_argument("origin", metavar="FOLDER_OR_REPOSITORY", help="./folder, /folder, or user/repository")
    parser.add_argument("--output", "-o", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    given = parser.parse_args(arguments)

    from evmamba.launch.use.hub import pull

    print(pull(given.origin, given.output, given.revision))
    return 0
