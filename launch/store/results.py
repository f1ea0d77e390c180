"""The result store: one JSON file a run, written atomically, read back with errors that name the file.

A result says what ran, how it ended, what it measured and where it comes from; the report needs nothing else.
`Result` describes it field by field; `SCHEMA` rises when a reader of the old form would misunderstand the new one.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.files import write_text
from evmamba.launch.store.result_schema import Data, GitState, Provenance, Training, checked
from evmamba.processor import processor_name, usable_cores
from evmamba.tasks import TASKS
from evmamba.tasks.plain_files import is_file, read_json
from evmamba.tasks.training.lease import guard

SCHEMA = 1
FILE_NAME = "result.json"
COST = "cost"  # the task of a run that trains nothing and measures
STATES = ("finished", "failed")
_BEGAN, _BEGAN_AT = datetime.datetime.now(datetime.UTC), time.monotonic()


@dataclass
class Result:
    """One run.

    Attributes:
        run: name of the run, unique within a benchmark.
        task: one of `evmamba.tasks.TASKS`; `COST` is a measurement of the bare backbone, or with a head of both.
        model: name of the backbone, e.g. ``"efficientvmamba_t"``.
        head: key of what stands on the backbone (`Task.heads`).
        status: ``"finished"`` or ``"failed"``.
        reason: one line, why it failed; None when it did not.
        blocked_by: of a run that was never started: the run before it that failed, the first one of a chain.
        data: name, root, split, train_images, val_images, test_images, num_classes, fingerprint.
        metrics: fractions in [0, 1]; None where the metric is undefined on this data.
        cost: of the backbone (task ``"cost"``) or of the whole model: parameters, MACs (multiply-adds), milliseconds,
            MB, images/s.
        protocol: input size, test-time augmentation, which weights were tested.
        training: epochs, steps, images/s, loss curve as ``[[step, loss], ...]``.
        details: what a task adds: per-class metrics, confusion matrix, counts, file names and their hashes.
        gallery: pictures of predictions, relative to the folder of the result.
        provenance: see `provenance`. Results that differ in its ``seed`` alone are repetitions of one thing.
        suite: which suite asked for the run, e.g. ``"main"``; None for a run by hand.
        sweeps: curves of one model: name of what was varied (``"input_size"``, ``"batch_size"``) -> points in rising
            order, each a mapping of that name, of metrics and of cost keys to numbers, or of ``"failed"`` to a reason.
    """

    run: str
    task: str
    model: str
    head: str | None = None
    status: str = "finished"
    reason: str | None = None
    blocked_by: str | None = None
    data: Data | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    details: dict[str, Any] = field(default_factory=dict)
    gallery: list[str] = field(default_factory=list)
    provenance: Provenance = field(default_factory=Provenance)
    suite: str | None = None
    sweeps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)
    """Where it was read from or written to; not in the file."""

    def __post_init__(self) -> None:
        if self.task != COST and self.task not in TASKS:
            raise UserError(
                f"task is '{self.task}', not one of {', '.join((COST, *TASKS))}; a task of another project is known "
                "where that is installed, or with --import MODULE"
            )
        if self.status not in STATES:
            raise UserError(f"status is '{self.status}', not one of {', '.join(STATES)}")
        if self.status == "failed" and not self.reason:
            raise UserError("a failed run without a reason")
        if self.head is not None:
            TASKS.of_head(self.head) if self.task == COST else TASKS[self.task].head(self.head)  # or it says so

    @property
    def finished(self) -> bool:
        return self.status == "finished"


def write_result(result: Result, folder: Path) -> Path:
    """Write ``folder/result.json`` atomically and return its path. Numbers that are not finite become null.

    Raises:
        UserError: the folder cannot be written, or is another start's by now (`LeaseLost`).
    """
    document = {"schema": SCHEMA} | {k: v for k, v in dataclasses.asdict(result).items() if k != "folder"}
    path = Path(folder) / FILE_NAME
    guard(path)
    write_json(path, document)
    result.folder = Path(folder)
    return path


def read_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        UserError: the file is missing, no JSON, of another schema version, or not a result; the message names it.
    """
    path = Path(path)
    document = read_json(path)
    if not isinstance(document, dict) or "schema" not in document:
        raise UserError(f"{path}: not a result of evmamba (no schema version)")
    schema = document.pop("schema")
    if schema != SCHEMA:
        raise UserError(f"{path}: result of schema version {schema}, this evmamba reads version {SCHEMA}; run it again")
    known = {f.name: f for f in dataclasses.fields(Result) if f.name != "folder"}
    for name in document:
        if name not in known:
            raise UserError(f"{path}: unknown field '{name}' in a result of version {SCHEMA}")
    for name in ("run", "task", "model"):
        if not isinstance(document.get(name), str):
            raise UserError(f"{path}: field '{name}' is missing or not a text")
    try:
        return Result(**checked(document), folder=path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def find_results(paths: Iterable[Path]) -> list[Path]:
    """The result files under some files and folders, sorted by path, each once.

    Raises:
        UserError: a path does not exist, or no result lies under any of them.
    """
    paths = [Path(path) for path in paths]
    found: dict[Path, Path] = {}  # by where it really is
    for path in paths:
        if path.is_dir():
            found |= {Path(os.path.realpath(file)): file for file in sorted(path.rglob(FILE_NAME))}
        elif is_file(path):
            found[path.resolve()] = path
        else:
            raise UserError(f"{path}: no such file or folder; give result files or folders that hold them")
    if not found:
        raise UserError(
            f"no {FILE_NAME} under {', '.join(map(str, paths))}; 'evmamba bench' or 'evmamba test' write them"
        )
    return [path.absolute() for path in found.values()]


def write_json(path: Path, document: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it.

    Raises:
        UserError: the folder cannot be written.
    """
    text = json.dumps(_plain(document), indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder and a file in it, which is gone again at once.

    Raises:
        UserError: that is not possible; the message offers `option` to choose another folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {folder} ({error.strerror}); choose another with {option}"
        ) from error


def trained_from_scratch(result: Result) -> bool | None:
    """Whether a training began with random weights; None where a result is of no training or does not say.

    A run that tests another one's weights says it of that one (`from_scratch` in its provenance).
    """
    origin = result.provenance
    if "from_scratch" in origin:
        return origin["from_scratch"]
    arguments = ((origin.get("config") or {}).get("model") or {}).get("init_args")
    if arguments is None or not result.training.get("steps"):
        return None
    return not (origin.get("init_from") or arguments.get("checkpoint"))


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(config: Any) -> str:
    """A short name for a configuration: the same for equal content, whatever the order of its keys."""
    canonical = json.dumps(_plain(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def now() -> datetime.datetime:
    """The time, as the clock had it when this process began and what has passed since: whoever sets the clock changes
    no duration between two of these."""
    return _BEGAN + datetime.timedelta(seconds=time.monotonic() - _BEGAN_AT)


def provenance(
    *,
    config: Mapping[str, Any],
    seed: int | None,
    device: str,
    precision: str,
    start: datetime.datetime,
    nodes: int = 1,
    processes: int = 1,
) -> Provenance:
    """Where a result comes from: code, configuration, machine, time.

    Args:
        config: everything that decides the run; stored whole, beside its hash.
        device: name of the device that worked, e.g. ``"NVIDIA H200"`` or the processor's.
        start: of `now`; the duration [s] is counted from it.
    """
    return {
        **git_state(),
        "config": dict(config),
        "config_hash": config_hash(config),
        "seed": seed,
        "versions": versions(),
        "device": device,
        "precision": precision,
        "nodes": nodes,
        "processes": processes,
        "start": start.astimezone(datetime.UTC).isoformat(timespec="seconds"),
        "duration_s": round((now() - start).total_seconds(), 1),
    }


@functools.cache
def git_state() -> GitState:
    """Commit and dirty flag of the checkout that this code runs from, as of the first call; None for an installed
    package."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository: only a tracked file counts.
        git("ls-files", "--error-unmatch", here.name)
        return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}


def code_of(origin: Provenance, digits: int = 12) -> str:
    """For people: with which code a result was made."""
    commit = origin.get("git_commit")
    return f"{commit[:digits]}{' with changes' if origin.get('git_dirty') else ''}" if commit else "installed package"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in ("evmamba", "torch", "torchvision", "lightning", "timm", "triton", "pycocotools"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(kind: str) -> str:
    """The name of a device as people know it: the GPU's, or the processor's with its number of usable cores."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    if kind != "cpu":
        return kind
    cores = usable_cores()
    return f"{processor_name()}, {cores} core{'s' if cores > 1 else ''}"


def _plain(value: Any) -> Any:
    """What JSON can hold: tensors and numpy scalars as numbers, paths as text, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {_plain(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, Path | str):  # a file's name may be no UTF-8, which JSON has to be
        return str(value).encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return _plain(str(value))
