"""What the parts of a result file are, as far as a report reads them: its file may be anybody's.

Only what is named here is looked at. What a task adds to ``protocol`` and ``details`` is shown as text.
"""

from typing import Any, TypedDict

import msgspec

from evmamba.errors import UserError, printable
from evmamba.tasks.plain_files import Whole

Number = Whole | float
# Of a cost and of a sweep's points all is a number but these.
TEXTS = ("failed", "input_size", "peak_memory_kind")


class Data(TypedDict, total=False):
    name: str | None
    root: str | None
    fingerprint: str | None
    split: str | None
    num_classes: Whole | None
    train_images: Whole | None
    val_images: Whole | None
    test_images: Whole | None


class Protocol(TypedDict, total=False):
    weights: str | None
    stage: str | None
    input_size: list[Whole] | None


class Training(TypedDict, total=False):
    steps: Whole | None
    epochs: Number | None
    images: Whole | None
    images_per_s: Number | None
    seconds: Number | None
    starts: Whole | None
    checkpoint_seconds: Number | None
    curve: list[tuple[Number, Number | None]] | None
    validation: list[tuple[Number, dict[str, Number | None]]] | None


class Details(TypedDict, total=False):
    per_class: dict[str, dict[str, Number | None]] | None
    confusion: list[list[Number]] | None
    files: list[str]
    sha256: dict[str, str] | None
    rounds: dict[str, list[Number]] | None


class Part(TypedDict, total=False):
    class_path: str | None
    init_args: dict[str, Any] | None


class Config(TypedDict, total=False):
    """Of a training or test that finished; what measures and what failed has its spec there."""

    trainer: dict[str, Any] | None
    model: Part | None
    data: Part | None


class GitState(TypedDict):
    git_commit: str | None
    git_dirty: bool | None


class Turns(TypedDict, total=False):
    """Runs that were measured side by side."""

    runs: list[str]
    start: str


class Provenance(TypedDict, total=False):
    config: dict[str, Any] | None
    settings: dict[str, Any] | None
    versions: dict[str, str]
    seed: Whole | None
    device: str | None
    precision: str | None
    nodes: Whole | None
    processes: Whole | None
    start: str | None
    duration_s: Number | None
    git_commit: str | None
    git_dirty: bool | None
    init_from: str | None
    from_scratch: bool | None
    interrupted: bool
    config_hash: str | None
    spec_hash: str | None
    init_family: str | None
    threads: Whole | None
    trial: bool
    trials: Whole
    turns: Turns | None


class SweepPoint(TypedDict, total=False):
    input_size: list[Whole] | Whole
    batch_size: Whole
    failed: str


class Document(TypedDict, total=False):
    """A result file without its schema version; see `Result` for what the fields mean."""

    run: str
    task: str
    model: str
    head: str | None
    status: str
    reason: str | None
    blocked_by: str | None
    data: Data | None
    metrics: dict[str, Number | None]
    cost: dict[str, Number | str | list[Whole] | None]
    protocol: Protocol
    training: Training
    details: Details
    gallery: list[str]
    provenance: Provenance
    suite: str | None
    sweeps: dict[str, list[SweepPoint]]


def checked(document: dict[str, Any]) -> dict[str, Any]:
    """The document with its texts made printable, if everything that a report reads is of the right kind.

    Raises:
        UserError: something is not; says what and where, not in which file.
    """
    try:
        msgspec.convert(document, Document)
        if document.get("status", "finished") == "finished" and document.get("task") != "cost":
            for name in ("config", "settings"):
                msgspec.convert(document.get("provenance", {}).get(name), Config | None)
    except msgspec.ValidationError as error:
        raise UserError(str(error)) from error
    points = [("sweeps", point) for sweep in document.get("sweeps", {}).values() for point in sweep]
    for where, numbers in [("cost", document.get("cost", {})), *points]:
        for name, value in numbers.items():
            if not (value is None or type(value) in (int, float) or name in TEXTS):
                raise UserError(f"'{name}' of {where} is not a number")
    return {name: _printable(value) for name, value in document.items()}


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    if isinstance(value, dict):
        return {printable(name): _printable(entry) for name, entry in value.items()}
    return value
