"""`evmamba data`: embedded, check and shard."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evmamba.errors import UserError, unknown_name
from evmamba.files import write_text
from evmamba.launch.commands.parser import Parser
from evmamba.launch.commands.shared import need_extra
from evmamba.tasks import TASKS

HELP = """\
usage: evmamba data ACTION [options]

  embedded    make the embedded data sets and say where they are
  check       look at every file of a data set before a job is submitted
  shard       pack class folders into tar shards

evmamba data ACTION --help says more; the layouts are in docs/data.md."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0 if arguments else 2
    actions = {"embedded": _embedded, "check": _check, "shard": _shard}
    if arguments[0] not in actions:
        raise unknown_name("action of evmamba data", arguments[0], actions)
    return actions[arguments[0]](arguments[1:])


def _embedded(arguments: Sequence[str]) -> int:
    Parser("evmamba data embedded", "Make the embedded data sets and say where they are.").parse_args(arguments)
    need_extra()

    from evmamba.tasks.embedded import ensure_embedded

    for task in TASKS.values():
        if task.embedded is not None:
            print(f"{task.name:15} {ensure_embedded(task.name)}")
    return 0


def _check(arguments: Sequence[str]) -> int:
    parser = Parser(
        "evmamba data check",
        "Look at every file: unreadable images, wrong sizes, broken annotations, labels out of range, images of val "
        "in train. Exit status 1 if something would stop a training.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--task", help=f"{', '.join(TASKS)} (default: the layout tells)")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found, classes one by one, here")
    own = {option.name: task for task in TASKS.values() for option in task.check_options}
    for task in TASKS.values():
        group = parser.add_argument_group(f"{task.name}, as in the recipe")
        for option in task.check_options:
            if own[option.name] is task:  # an option that two tasks have is one option
                flag = f"--{option.name.replace('_', '-')}"
                group.add_argument(flag, type=OPTION_TYPES[option.kind], metavar=option.kind.upper(), help=option.what)
    given = parser.parse_args(arguments)
    need_extra()

    import json

    from rich.console import Console

    from evmamba.tasks.check import check_data
    from evmamba.tasks.findings import print_findings

    options = {name: value for name in own if (value := getattr(given, name)) is not None}
    findings = check_data(given.folder, given.task, given.jobs, Console(stderr=True), options)
    print_findings(findings, Console())
    if given.json is not None:
        write_text(given.json, json.dumps(findings.as_json(), indent=1, ensure_ascii=False) + "\n")
    return 1 if findings.errors else 0


def _shard(arguments: Sequence[str]) -> int:
    parser = Parser("evmamba data shard", "Pack train/<class>/* and val/<class>/* into tar shards (webdataset's kind).")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the class folders")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    parser.add_argument("--shard-size", default="300MB", metavar="SIZE", help="about so large (default: %(default)s)")
    parser.add_argument("--jobs", type=_positive, default=8, metavar="N", help="shards at once (default: %(default)s)")
    given = parser.parse_args(arguments)
    need_extra()

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from evmamba.tasks.classification.packing import write_shards

    shard_bytes = _size(given.shard_size)
    columns = (TextColumn("images packed"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=None)
        written = write_shards(
            given.folder,
            given.output,
            shard_bytes,
            given.jobs,
            lambda done, total: bar.update(row, advance=done, total=total),
        )
    for split, files in written.items():
        size = sum(file.stat().st_size for file in files)
        print(f"{split:6} {len(files)} shard{'s'[: len(files) != 1]}, {size / 1e6:.1f} MB in {given.output / split}")
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text == "true"


OPTION_TYPES: dict[str, Callable[[str], Any]] = {"number": int, "count": _positive, "bool": _bool}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.upper())
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--shard-size {text} is not a size; write it like 300MB")
    return int(float(match[1]) * UNITS[match[2]])
