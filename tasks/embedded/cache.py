"""Where the embedded data lives: made once per user and version, safe with several processes at once."""

import logging
import shutil
from pathlib import Path

from filelock import FileLock

from evmamba.errors import UserError
from evmamba.files import new_folder, unfinished
from evmamba.tasks import TASKS
from evmamba.tasks.cache import cache_folder
from evmamba.tasks.record import Embedded, load

_log = logging.getLogger(__name__)


def ensure_embedded(task: str, root: Path | None = None) -> Path:
    """Return the folder of a task's embedded data set, drawing it first if it is not there yet (a few seconds).

    Args:
        task: its name.
        root: folder that holds the sets; ``$EVMAMBA_CACHE``, else ``~/.cache/evmamba``.

    Raises:
        UserError: unknown task, one without such data, or the folder cannot be written.
    """
    embedded = TASKS[task].embedded
    if embedded is None:
        raise UserError(f"the task {task} has no embedded data; name a folder")
    root = (root or cache_folder()).absolute()
    folder = root / f"{task}-v{embedded.version}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            if not folder.is_dir():
                _log.info("drawing the embedded %s data in %s", task, folder)
                _make(folder, embedded)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write the embedded {task} data in {root} ({reason}); set EVMAMBA_CACHE to a folder you can write"
        ) from error
    return folder


def _make(folder: Path, embedded: Embedded) -> None:
    for stale in unfinished(folder):  # left by a process that was killed; its lock is ours now
        shutil.rmtree(stale, ignore_errors=True)
    with new_folder(folder) as partial:
        load(embedded.write)(partial, train=embedded.train, val=embedded.val)
