"""Shards copied once to a node's own disk, for all processes and jobs on that node."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from evmamba.errors import UserError
from evmamba.files import replacing, unfinished

COPIES_AT_ONCE = 4
CHUNK = 16 * 2**20


def stage(files: Sequence[Path], staging_dir: str) -> list[Path]:
    """Copy files into a folder of this node, unless they are there already (same size and time of modification).

    One process copies, the others on the node wait for it. Every copy gets its name when it is complete, so that what
    an interrupted job leaves is continued by the next.

    Args:
        files: shards; two of them may have the same name.
        staging_dir: a folder on a local disk; ``$VARIABLES`` of the node are filled in.

    Returns:
        The copies, in the order given.

    Raises:
        UserError: a variable that is not set, too little room, a folder that cannot be written, a source that cannot be
            read.
    """
    expanded = Path(os.path.expandvars(staging_dir)).expanduser()
    if "$" in str(expanded):
        raise UserError(f"data.staging_dir={staging_dir} names a variable that is not set on this node")
    copies = [_copy_of(file, expanded) for file in files]
    try:
        expanded.mkdir(parents=True, exist_ok=True)
        with FileLock(expanded / ".evmamba-staging.lock"):
            missing = [(file, copy) for file, copy in zip(files, copies, strict=True) if not _same(file, copy)]
            if missing:
                _copy_all(missing, expanded)
    except OSError as error:
        where = error.filename or expanded
        raise UserError(f"cannot stage shards in {expanded}: {error.strerror or error} ({where})") from error
    return copies


def _copy_of(file: Path, folder: Path) -> Path:
    """Where the copy goes: data sets, and splits of one, may have shards of the same name."""
    source = hashlib.sha256(str(file.parent.resolve()).encode()).hexdigest()[:12]
    return folder / source / file.name


def _same(file: Path, copy: Path) -> bool:
    if not copy.is_file():
        return False
    ours, theirs = file.stat(), copy.stat()
    return (ours.st_size, int(ours.st_mtime)) == (theirs.st_size, int(theirs.st_mtime))


def _copy_all(missing: list[tuple[Path, Path]], folder: Path) -> None:
    needed = sum(file.stat().st_size for file, _ in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"staging needs {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free; choose another "
            "data.staging_dir, or leave it out to read the shards where they are"
        )
    columns = (TextColumn("staging shards"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(file=sys.stderr)
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    with progress as bar, ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        task = bar.add_task("", total=needed)
        for _ in pool.map(lambda pair: _copy(pair[0], pair[1], lambda count: bar.advance(task, count)), missing):
            pass


def _copy(file: Path, copy: Path, advance: Callable[[int], None]) -> None:
    copy.parent.mkdir(exist_ok=True)
    for stale in unfinished(copy):  # left by a process that was killed; its lock is ours now
        stale.unlink()
    with replacing(copy, durable=False) as partial:
        with file.open("rb") as source, partial.open("wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                advance(len(chunk))
        shutil.copystat(file, partial)
        if partial.stat().st_size != file.stat().st_size:
            raise UserError(f"shard {file} changed while it was staged; start again when nobody writes to it")
