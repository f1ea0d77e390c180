"""Files and folders that appear under their names whole or not at all, also where a process or a machine dies."""

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from evmamba.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give the name of an empty file beside `path`, which takes its place when the block ends without an error.

    It has the permissions of any new file there. Several processes may write the same file: the last one stays. A
    process that is killed leaves its file behind, see :func:`unfinished` and :func:`remove_unfinished`.

    Args:
        path: the file; its folder must exist. The name given has the same suffix.
        durable: have content and name on the disk before the block ends; without it a machine that loses power may
            come back with an empty file.

    Raises:
        OSError: from the block as it is, and from here; see :func:`write_errors`.
    """
    partial = _beside(path, path.suffix)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield partial
        if durable:
            _sync(partial)
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`, which gets that name when the block ends without an error.

    Args:
        path: does not exist yet, or is an empty folder; the one above it must exist.

    Raises:
        OSError: from the block as it is, and from here; see :func:`write_errors`.
    """
    partial = _beside(path)
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless something above failed


def unfinished(path: Path) -> list[Path]:
    """What processes have beside `path` that write it now or were killed while they did."""
    return sorted(path.parent.glob(f"{glob.escape(_prefix(path))}*"))


def remove_unfinished(folder: Path, keep: Path | None = None) -> None:
    """Remove what killed processes were writing in a folder; for its owner alone, while nobody else writes there.

    Args:
        folder: it need not exist.
        keep: a file that others may be writing all the same.
    """
    spared = set() if keep is None else set(unfinished(keep))
    for path in set(folder.glob(".*.partial-*")) - spared:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # gone meanwhile, or it stays: nobody reads it
                path.unlink()


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says against writing `path` into one line for the user.

    Raises:
        UserError: for every OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file, and the folders above it, so that a reader sees the old file or the new one.

    Raises:
        UserError: it cannot be written.
    """
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=durable) as partial:
            partial.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power failure, where the system can."""
    with contextlib.suppress(OSError):  # some network file systems refuse this for folders
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str = "") -> Path:
    return path.with_name(f"{_prefix(path)}-{secrets.token_hex(4)}{suffix}")


def _prefix(path: Path) -> str:
    return f".{path.name}.partial"
