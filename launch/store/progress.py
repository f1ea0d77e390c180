"""How far a run is, for whoever waits for it: ``progress.json`` in its folder, and what its log ends with.

Files rather than pipes: they can be read from another node, and by somebody who comes later.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from evmamba.errors import UserError, printable
from evmamba.files import write_text
from evmamba.launch.store.spec import LOG_FILE
from evmamba.tasks.plain_files import Whole, read_json
from evmamba.tasks.training.lease import guard

PROGRESS_FILE = "progress.json"
# So much of a log's end is read for its last line.
TAIL_BYTES = 4096


@dataclass(frozen=True)
class Progress:
    """What a run does.

    Attributes:
        phase: "training", "testing", ...
        done, total: steps or batches, of how many (0: not known).
        loss: the latest.
        checkpoint_seconds: how long it took to save the last checkpoint; what a warning ahead of a time limit must
            leave time for.
    """

    phase: str
    done: Whole = 0
    total: Whole = 0
    loss: float | None = None
    checkpoint_seconds: float | None = None


def write_progress(
    folder: Path,
    phase: str,
    done: int = 0,
    total: int = 0,
    loss: float | None = None,
    checkpoint_seconds: float | None = None,
) -> None:
    """Replace ``folder/progress.json``; what a checkpoint took stays known until it is measured again.

    A run does not end because this cannot be written (a full disk): the file then tells of earlier.

    Raises:
        LeaseLost: the folder is another start's by now.
    """
    guard(folder)
    if checkpoint_seconds is None and (before := read_progress(folder)) is not None:
        checkpoint_seconds = before.checkpoint_seconds
    progress = Progress(phase, done, total, loss, checkpoint_seconds)
    with contextlib.suppress(UserError):
        write_text(folder / PROGRESS_FILE, json.dumps(asdict(progress)), durable=False)


def read_progress(folder: Path) -> Progress | None:
    """The progress of the run in a folder; None where it has not said any."""
    try:
        return msgspec.convert(read_json(folder / PROGRESS_FILE), Progress)
    except (UserError, msgspec.ValidationError):
        return None


def last_words(folder: Path) -> str:
    """The last line of the log of the run in a folder that is not empty, with the log's name."""
    path = folder / LOG_FILE
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return f"no log at {path}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{printable(last)} (see {path})"
