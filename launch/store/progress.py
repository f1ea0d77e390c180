"""How far a run is, for whoever waits for it: ``progress.json`` in its folder.

A file rather than a pipe: it can be read from another node, and by somebody who comes later.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from evmamba.files import write_text

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class Progress:
    """What a run does: its phase, steps or batches done, of how many (0: not known), and the latest loss."""

    phase: str
    done: int = 0
    total: int = 0
    loss: float | None = None


def write_progress(folder: Path, phase: str, done: int = 0, total: int = 0, loss: float | None = None) -> None:
    """Replace ``folder/progress.json``."""
    write_text(folder / PROGRESS_FILE, json.dumps(asdict(Progress(phase, done, total, loss))), durable=False)


def read_progress(folder: Path) -> Progress | None:
    """The progress of the run in a folder; None where it has not said any."""
    try:
        return Progress(**json.loads((folder / PROGRESS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
