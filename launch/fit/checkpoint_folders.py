"""Checkpoints that are folders with files of every process (ZeRO, FSDP2): written whole, looked into, made one file."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from evmamba.checkpoints import LIGHTNING_RAW_SLOT, write_safetensors
from evmamba.errors import UserError, first_line
from evmamba.files import write_errors
from evmamba.tasks.training.callbacks import AtomicCheckpointIO
from evmamba.tasks.training.checkpoint_safety import Torn, check_folder, holds, is_archive, load_plain
from evmamba.tasks.training.lease import guard

Kind = Literal["deepspeed", "fsdp2"]
# Within DeepSpeed's folder, as Lightning names it.
TAG = "checkpoint"
# Lightning's file in FSDP2's folder: everything but weights and optimizer states.
REST_FILE = "meta.pt"
# Where a ZeRO folder keeps the averaged weights, if the training averages; the raw ones are DeepSpeed's own entries.
AVERAGE_SLOT = "averaged_model_state"
# Entry of a consolidated file: the folder it was made from. No training can go on from it.
ORIGIN = "evmamba_consolidated_from"


def folder_kind(folder: Path) -> Kind | None:
    """Which strategy wrote a folder; None for one that is no checkpoint, or not a whole one."""
    files = sorted((folder / TAG).glob("*.pt"))
    if (folder / "latest").is_file() and files:
        return "deepspeed" if all(is_archive(file) for file in files) else None
    if (folder / ".metadata").is_file() and (folder / REST_FILE).is_file():
        return "fsdp2" if is_archive(folder / REST_FILE) else None
    return None


def is_consolidated(file: Path) -> bool:
    """Whether `consolidate` made a file; told without unpickling it."""
    try:
        return holds(file, ORIGIN.encode())
    except Torn:
        return False


def processes_of(folder: Path) -> int:
    """How many processes wrote a DeepSpeed folder."""
    return len(list((folder / TAG).glob("*optim_states.pt")))


@contextlib.contextmanager
def replaced_folder(target: Path, strategy: Strategy) -> Iterator[Path]:
    """Give all processes a folder to write into, which takes the place of `target` when all of them have.

    A folder cannot be exchanged in one step: killed between the two renames, the previous checkpoint is the one with a
    dot before its name and ``.previous`` after it, and `restore_previous` puts it back.
    """
    partial = Path(strategy.broadcast(str(target.with_name(f".{target.name}.partial-{os.getpid()}"))))
    if strategy.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
    strategy.barrier()
    yield partial
    strategy.barrier()
    if strategy.is_global_zero:
        guard(target)
        previous = _previous(target)
        if target.is_dir():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        partial.replace(target)
        shutil.rmtree(previous, ignore_errors=True)
    strategy.barrier()


def restore_previous(target: Path) -> None:
    """Put the previous checkpoint back, if writing ended between taking it away and putting the new one there."""
    if not target.exists():
        with contextlib.suppress(FileNotFoundError):  # there is none, or another process was faster
            _previous(target).rename(target)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def consolidate(folder: Path, output: Path | None = None) -> Path:
    """Make one file of a sharded checkpoint; its weights are the trained float32 ones, bit for bit.

    Args:
        folder: what a training with ``deepspeed_stage_1``, ``_2``, ``_3`` or ``fsdp2`` saved.
        output: ``*.safetensors`` for the weights alone (averaged ones if the training averaged), otherwise a checkpoint
            for ``test --ckpt_path`` and for `evmamba.load_checkpoint`, with raw and averaged weights but without
            optimizer states. Default: ``NAME.consolidated.ckpt`` beside the folder.

    Returns:
        The file.

    Raises:
        UserError: no whole sharded checkpoint, DeepSpeed is missing, or the file cannot be written.
    """
    restore_previous(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; consolidate takes the sharded checkpoints of ZeRO and FSDP2")
    output = output or folder.with_name(f"{folder.stem}.consolidated.ckpt")
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file with --output")
    checkpoint = read_whole(folder)
    if output.suffix == ".safetensors":
        with write_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(checkpoint["state_dict"], output)
    else:
        AtomicCheckpointIO().save_checkpoint(checkpoint | {ORIGIN: str(folder)}, output)
    return output


def read_whole(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a file or a sharded folder, as one with whole weights on the CPU; of a folder's entries only
    what an evaluation needs.

    Raises:
        UserError: no whole checkpoint, or DeepSpeed is missing.
    """
    if path.is_file():
        return load_plain(path)
    kind = folder_kind(path)
    if kind is None:
        raise UserError(f"{path} is no sharded checkpoint, or not a whole one; ZeRO and FSDP2 write such folders")
    check_folder(path)
    try:
        return _read_deepspeed(path) if kind == "deepspeed" else _read_fsdp2(path)
    except UserError:
        raise
    except (
        Exception,
        CheckpointException,
    ) as error:  # what these libraries raise where a folder is not as they left it
        raise Torn(f"{path} is no whole checkpoint ({first_line(error)}; {type(error).__name__})") from error


def _read_deepspeed(folder: Path) -> dict[str, Any]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ModuleNotFoundError as error:
        raise UserError(
            "reading this folder needs DeepSpeed; in evmamba's folder: pip install '.[deepspeed]'"
        ) from error

    written = load_plain(min((folder / TAG).glob("*model_states.pt")))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # prints and bars
        weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(folder, TAG)
    # DeepSpeed makes float32 of buffers too, counters among them.
    raw = {name: weights[name].to(value.dtype) for name, value in written["module"].items()}
    checkpoint = _described(written)
    if AVERAGE_SLOT in written:
        return checkpoint | {"state_dict": written[AVERAGE_SLOT], LIGHTNING_RAW_SLOT: raw}
    return checkpoint | {"state_dict": raw}


def _read_fsdp2(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    prefix = "state_dict."
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(weights, storage_reader=reader, no_dist=True)
    rest = load_plain(folder / REST_FILE)
    checkpoint = _described(rest)
    return checkpoint | {"state_dict": {name.removeprefix(prefix): value for name, value in weights.items()}}


# Entries of which an evaluation has no need: of a training that goes on, and DeepSpeed's own.
OF_TRAINING = {
    *("state_dict", "optimizer_states", "lr_schedulers", "callbacks", AVERAGE_SLOT),
    *("module", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "ds_config", "ds_version"),
    *("buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params"),
    *(
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
    ),
}


def _described(written: dict[str, Any]) -> dict[str, Any]:
    """The entries that an evaluation needs besides the weights: Lightning's, and what the task's module put there."""
    return {key: value for key, value in written.items() if key not in OF_TRAINING}
