"""`evmamba report`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="evmamba report", description="One table of any result files.")
    parser.add_argument("results", nargs="+", type=Path, metavar="DIR", help="result files, or folders that hold them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where report.* go (default: the first DIR)")
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console

    from evmamba.launch.report.build import report_from, show_report

    first: Path = given.results[0]
    folder = given.output or (first if first.is_dir() else first.parent)
    show_report(report_from(given.results), folder, Console())
    return 0
