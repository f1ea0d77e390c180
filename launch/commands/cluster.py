"""`evmamba cluster check`."""

from collections.abc import Sequence
from pathlib import Path

from evmamba.errors import unknown_name
from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import add_cluster_options, cluster_options, need_extra

HELP = """\
usage: evmamba cluster check [options]

  check    a job of two minutes that tries what trainings rely on; prints the settings that fit

evmamba cluster check --help says more; docs/cluster.md begins with it."""
DESCRIPTION = """Submit a job of two minutes that tries what trainings rely on (processes, shared folder, file locks,
rendezvous and interfaces, the signal before the time limit, requeueing), tell what it found, and print the settings
that fit. Called again with the same folder it goes on waiting; with other settings it tries those."""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0 if arguments else 2
    if arguments[0] != "check":
        raise unknown_name("action of evmamba cluster", arguments[0], ["check"])
    parser = Parser(prog="evmamba cluster check", description=DESCRIPTION)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("cluster-check"),
        metavar="DIR",
        help="seen by all nodes (default: %(default)s)",
    )
    add_cluster_options(parser)
    given = parser.parse_args(arguments[1:])
    need_extra()

    from rich.console import Console

    from evmamba.launch.cluster.settings import read_cluster
    from evmamba.launch.cluster.submission import check_slurm

    cluster = read_cluster(given.cluster, cluster_options(given))
    check_slurm()

    from evmamba.launch.cluster.check import check

    return 0 if check(cluster, given.output.expanduser().resolve(), Console()) else 1
