"""`evmamba status`."""

import json
from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="evmamba status", description="What runs, waits, failed: from SLURM and from the result files."
    )
    parser.add_argument("output", nargs="?", type=Path, default=Path("bench"), metavar="OUTPUT", help="default: bench")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--record-failures",
        action="store_true",
        help="write the reason of runs that SLURM ended as their result, for a report",
    )
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console

    from evmamba.launch.cluster import jobs

    if given.record_failures:
        jobs.record_failures(given.output)
    states = jobs.states(given.output)
    if given.json:
        print(json.dumps([state.as_dict() for state in states], indent=1))
    else:
        Console().print(jobs.table(states))
    return 0
