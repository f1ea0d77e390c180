"""Where the embedded data lives: made once per user and version, safe with several processes at once."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from evmamba.errors import UserError, unknown_name
from evmamba.files import new_folder, unfinished
from evmamba.tasks.cache import cache_folder
from evmamba.tasks.embedded.landscapes import write_segmentation
from evmamba.tasks.embedded.seabed import write_detection
from evmamba.tasks.embedded.signs import write_classification

_log = logging.getLogger(__name__)

# Part of the folder's name: raise it when a drawn pixel or a label changes, and every user gets the new set.
VERSION = 2

_WRITERS: dict[str, Callable[[Path], None]] = {
    "classification": lambda root: write_classification(root, train=600, val=200),
    "detection": lambda root: write_detection(root, train=280, val=60),
    "segmentation": lambda root: write_segmentation(root, train=200, val=50),
}
EMBEDDED_TASKS = tuple(_WRITERS)


def ensure_embedded(task: str, root: Path | None = None) -> Path:
    """Return the folder of a task's embedded data set, drawing it first if it is not there yet (a few seconds).

    Args:
        task: ``"classification"``, ``"detection"`` or ``"segmentation"``.
        root: folder that holds the sets; ``$EVMAMBA_CACHE``, else ``~/.cache/evmamba``.

    Raises:
        UserError: unknown task, or the folder cannot be written.
    """
    if task not in _WRITERS:
        raise unknown_name("task", task, _WRITERS)
    root = (root or cache_folder()).absolute()
    folder = root / f"{task}-v{VERSION}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            if not folder.is_dir():
                _log.info("drawing the embedded %s data in %s", task, folder)
                _make(folder, _WRITERS[task])
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write the embedded {task} data in {root} ({reason}); set EVMAMBA_CACHE to a folder you can write"
        ) from error
    return folder


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    for stale in unfinished(folder):  # left by a process that was killed; its lock is ours now
        shutil.rmtree(stale, ignore_errors=True)
    with new_folder(folder) as partial:
        write(partial)
