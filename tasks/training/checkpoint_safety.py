"""Reading checkpoints without running what they say.

A pickle can name any function and have it called. Here nothing is unpickled but tensors and plain values, and in the
folders of sharded trainings the few classes that DeepSpeed and torch.distributed.checkpoint write themselves. Those two
libraries unpickle their files without such a limit, so a folder goes through `check_folder` before they see it.
"""

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from evmamba.errors import UserError

METADATA_FILE = ".metadata"  # of torch.distributed.checkpoint
# What its pickle may name, besides the types of tensors.
_METADATA_GLOBALS = {
    *(
        (dcp.__name__, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
}


def load_plain(source: Path | io.BytesIO, name: str | None = None) -> Any:
    """What `torch.save` wrote, on the CPU, if it is tensors and plain values; a file is mapped, not read.

    Args:
        source: a whole file: one that is torn is told apart by its checksums (`checkpoint_files`), not here.
        name: of the source, for messages.

    Raises:
        UserError: it names something else, which reading it could run.
        OSError, RuntimeError, EOFError: it cannot be read.
    """
    try:
        return torch.load(source, map_location="cpu", mmap=isinstance(source, Path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(name or str(source)) from error


def check_folder(folder: Path) -> None:
    """Make sure that nothing in a sharded checkpoint names more than tensors, plain values, and what its library needs.

    Raises:
        UserError: it does.
        TornFolder: a file in it is torn.
    """
    try:
        with _zero_globals():
            for file in sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".ckpt")):
                load_plain(file)
        if (folder / METADATA_FILE).is_file():
            _check_distributed(folder)
    except UserError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        raise TornFolder(
            f"{folder} is no whole checkpoint ({type(error).__name__} while its files were read)"
        ) from error


def _refused(name: str) -> UserError:
    return UserError(
        f"{name} holds more than tensors and plain values, and reading that could run code of whoever wrote it; it is "
        "not read: checkpoints of evmamba's own trainings hold no such thing"
    )


@contextlib.contextmanager
def _zero_globals() -> Iterator[None]:
    """Allow the classes of ZeRO's optimizer states, where DeepSpeed is installed."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        yield
        return
    with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
        yield


class TornFolder(UserError):
    """A sharded checkpoint that is not whole."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and (module, name) not in _METADATA_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check_distributed(folder: Path) -> None:
    """The index of a folder, and the values in it that are no tensors, each a pickle within a file."""
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            index = _MetadataUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise _refused(str(file)) from error
    if not isinstance(index, dcp.Metadata):
        raise _refused(str(file))
    for entry, where in index.storage_data.items():
        if isinstance(index.state_dict_metadata.get(entry.fqn), dcp.TensorStorageMetadata):
            continue  # torch reads those as tensors only
        part = folder / where.relative_path
        if not part.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file} points out of its folder, to {where.relative_path}")
        with part.open("rb") as stream:
            stream.seek(where.offset)
            load_plain(io.BytesIO(stream.read(where.length)), f"{part} ({entry.fqn})")
