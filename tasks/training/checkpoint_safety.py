"""Reading checkpoints without running what they say.

A pickle can name any function and have it called. Here nothing is unpickled but tensors and plain values, and in the
folders of sharded trainings the few classes that DeepSpeed and torch.distributed.checkpoint write themselves. Those two
libraries unpickle their files without such a limit, so a folder goes through `check_folder` before they see it.
"""

import contextlib
import io
import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from evmamba.checkpoints import open_archive
from evmamba.errors import UserError, first_line

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


class Torn(UserError):
    """A checkpoint that is not whole: cut, damaged, or none at all."""


def load_plain(source: Path | io.BytesIO, name: str | None = None) -> Any:
    """What `torch.save` wrote, on the CPU, if it is tensors and plain values; a file is mapped, not read.

    Args:
        source: of a file that is torn not all is noticed here; its checksums tell (`checkpoint_files`).
        name: of the source, for messages.

    Raises:
        UserError: it names something else, which reading it could run.
        Torn: it cannot be read.
    """
    try:
        if isinstance(source, Path):
            with open_archive(source):
                pass
        return torch.load(source, map_location="cpu", mmap=isinstance(source, Path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(name or str(source)) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise _torn(name or str(source), error) from error


def is_archive(path: Path) -> bool:
    """Whether a file is one that `torch.save` may have written."""
    try:
        with open_archive(path):
            return True
    except Exception:  # whatever a damaged archive makes zipfile raise
        return False


def check_folder(folder: Path, *, checksums: bool = False) -> None:
    """Make sure that nothing in a sharded checkpoint names more than tensors, plain values, and what its library needs.

    Args:
        folder: of ZeRO or FSDP2.
        checksums: compare those of FSDP2's tensors too, which reads all of them once.

    Raises:
        UserError: it does.
        Torn: a file in it is.
    """
    try:
        with _zero_globals():
            for file in sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".ckpt")):
                load_plain(file)
        if (folder / METADATA_FILE).is_file():
            _check_distributed(folder, checksums)
    except UserError:
        raise
    except Exception as error:
        raise _torn(str(folder), error) from error


def holds(path: Path, name: bytes) -> bool:
    """Whether the pickles of what `torch.save` wrote contain some bytes; told without unpickling them.

    Raises:
        Torn: it is not whole, or nothing that `torch.save` wrote.
    """
    try:
        with open_archive(path) as archive:
            return any(name in archive.read(entry) for entry in archive.namelist() if entry.endswith("data.pkl"))
    except Exception as error:
        raise _torn(str(path), error) from error


def _torn(name: str, error: Exception) -> Torn:
    return Torn(f"{name} is no whole checkpoint ({first_line(error)[:80]}; {type(error).__name__} while it was read)")


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


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and (module, name) not in _METADATA_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check_distributed(folder: Path, checksums: bool) -> None:
    """The index of a folder, and the values in it that are no tensors, each a pickle within a file."""
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            index = _MetadataUnpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise _refused(str(file)) from error
    if not isinstance(index, dcp.Metadata):
        raise _refused(str(file))
    stored: Counter[str] = Counter()
    for entry, where in index.storage_data.items():
        part = folder / where.relative_path
        if not part.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file} points out of its folder, to {where.relative_path}")
        if not 0 <= where.offset <= where.offset + where.length <= part.stat().st_size:
            raise Torn(f"{file} names a part of {part} that is not there")
        stored[entry.fqn] += where.length
        is_tensor = isinstance(index.state_dict_metadata.get(entry.fqn), dcp.TensorStorageMetadata)
        if is_tensor and not checksums:
            continue  # torch reads those as tensors only
        with part.open("rb") as stream:
            stream.seek(where.offset)
            stored_bytes = io.BytesIO(stream.read(where.length))
        if not is_tensor:
            load_plain(stored_bytes, f"{part} ({entry.fqn})")
        elif zipfile.ZipFile(stored_bytes).testzip() is not None:
            raise Torn(f"{part} is damaged at {entry.fqn}")
    for name, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, dcp.TensorStorageMetadata):
            promised = math.prod(tensor.size) * tensor.properties.dtype.itemsize
            if not 0 <= promised <= stored[name]:  # torch takes the memory before it reads
                raise Torn(f"{file} promises {promised} bytes of {name} and has {stored[name]}")
