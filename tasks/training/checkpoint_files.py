"""Checkpoint files on the disk: which are whole, which is the newest, and how one replaces another."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evmamba.checkpoints import open_archive
from evmamba.errors import UserError
from evmamba.files import sync_folder
from evmamba.tasks.training.checkpoint_safety import Torn, check_folder, load_plain

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
# What a checkpoint needs for a training to go on; Lightning itself looks for the first.
NEEDED = ("pytorch-lightning_version", "state_dict", "loops", "optimizer_states", "lr_schedulers")
# Our own entry.
RUN_KEY = "evmamba_run"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, as far as one must know it to decide how to go on.

    Attributes:
        path: the file, or the folder of a sharded one.
        step: optimizer steps taken.
        ended: the limits (max_epochs, max_steps) at which the training ended there, or None.
    """

    path: Path
    step: int
    ended: dict[str, Any] | None = None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return what a checkpoint is, or None if it is torn: cut, empty, damaged inside, or without what is needed.

    The checksums of all its parts are compared, so it reads the whole file once. Of a folder (sharded checkpoint) it
    tests every file that is an archive.

    Raises:
        UserError: it is whole, but holds what could run code.
    """
    if path.is_dir():
        return _read_folder(path)
    if not _whole(path):
        return None
    try:
        content = load_plain(path)
    except Torn:
        return None
    if not isinstance(content, dict) or any(key not in content for key in NEEDED):
        return None
    return _checkpoint(path, content)


def _checkpoint(path: Path, content: dict[str, Any]) -> Checkpoint | None:
    """None where the entries are not of the kind that they should be."""
    step, run = content.get("global_step"), content.get(RUN_KEY, {})
    ended = run.get("ended") if isinstance(run, dict) else 0
    if type(step) is not int or step < 0 or not (ended is None or isinstance(ended, dict)):
        return None
    return Checkpoint(path, step, ended)


def step_of(path: Path) -> int | None:
    """Optimizer steps that a checkpoint says it has; None where it is not there, torn, or refused.

    Its weights are neither read nor checked.
    """
    try:
        content = load_plain(_states(path)[0] if path.is_dir() else path)
    except (UserError, OSError, IndexError):
        return None
    step = content.get("global_step") if isinstance(content, dict) else None
    return step if type(step) is int else None


def _whole(path: Path) -> bool:
    try:
        with open_archive(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever a damaged archive makes zipfile raise
        return False


def _read_folder(path: Path) -> Checkpoint | None:
    parts = [file for file in path.rglob("*") if file.suffix in (".pt", ".ckpt")]
    states = _states(path)
    if not states or not all(_whole(file) for file in parts):
        return None
    try:
        check_folder(path, checksums=True)
        content = load_plain(states[0])
    except Torn:
        return None
    return _checkpoint(path, content) if isinstance(content, dict) else None


def _states(folder: Path) -> list[Path]:
    """The files of a sharded checkpoint that say more than weights."""
    return sorted(file for file in folder.rglob("*.pt") if "model_states" in file.name or file.name == "meta.pt")


def candidates(root: Path) -> list[Path]:
    """Checkpoints of the run in `root` from which it could go on, those of the most steps first; whole or not.

    Ahead of them come those that do not say their step: they may be newer, and are torn. Times of modification say
    nothing: copying changes them, and nodes have clocks of their own.

    ``checkpoints/last.ckpt``, ``checkpoints/previous.ckpt``, and ``hpc_ckpt_N.ckpt``, which Lightning writes on SLURM
    where its own signal handlers are at work.
    """
    found = [root / "checkpoints" / LAST, root / "checkpoints" / PREVIOUS, *root.glob("hpc_ckpt_*.ckpt")]
    steps = {path: step_of(path) for path in found if path.exists()}
    unknown = [path for path, step in steps.items() if step is None]
    known = {path: step for path, step in steps.items() if step is not None}
    return [*unknown, *sorted(known, key=lambda path: -known[path])]


def newest_whole(paths: Sequence[Path]) -> tuple[Checkpoint | None, list[Path]]:
    """Return the first whole checkpoint of `paths`, and the torn ones before it."""
    torn: list[Path] = []
    for path in paths:
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            return checkpoint, torn
        torn.append(path)
    return None, torn


def unfinished_last(folder: Path) -> Path:
    """Where this process writes what is to become the folder's ``last.ckpt``; another one's is elsewhere."""
    return folder / f".{LAST}.partial-{os.getpid()}"


def replace_last(partial: Path, folder: Path) -> None:
    """Make `partial` the folder's ``last.ckpt``, and what that was ``previous.ckpt``.

    Killed anywhere in between, there is a whole file under one of the two names.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if last.exists():
        if previous.is_dir():
            shutil.rmtree(previous)
        elif last.is_dir():
            previous.unlink(missing_ok=True)  # a file, of before the training went on with a sharding strategy
        last.replace(previous)
    partial.replace(last)
    sync_folder(folder)
