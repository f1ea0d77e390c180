"""Read checkpoints of the original implementation and ours, safely; write safetensors.

Each network translates the parameter names of its original implementation (`Backbone.checkpoint_filter_fn`). Files of
the originals hold their weights in one of several slots, with or without wrappers' prefixes; see `load_checkpoint`.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from evmamba.backbone import Backbone
from evmamba.errors import UserError, first_few, first_line
from evmamba.files import replacing, write_errors

logger = logging.getLogger(__name__)

RAW_SLOTS: tuple[str, ...] = ("state_dict", "model")
EMA_SLOTS: tuple[str, ...] = ("ema_model", "model_ema", "state_dict_ema")
# Where Lightning's weight averaging keeps the raw weights; the average is then in `state_dict`.
LIGHTNING_RAW_SLOT = "current_model_state"


class Loaded(NamedTuple):
    """What `load_checkpoint` did.

    Attributes:
        slot: the mapping of the file that held the weights, `""` for the top.
        left_out: names in the checkpoint that the model has no use for.
        kept: names in the model that keep their initialisation.
        adapted: names whose values were made to fit the model's input.
    """

    slot: str
    left_out: list[str]
    kept: list[str]
    adapted: list[str]


def load_checkpoint(
    model: Backbone,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    use_ema: bool = True,
    weights_only: bool = True,
) -> Loaded:
    """Load weights into a classifier or feature pyramid: EfficientVMamba, VMamba or Vim.

    Reads safetensors, our Lightning checkpoints and every format of the original: the weights are the first non-empty
    mapping of the slots `ema_model`, `model_ema`, `state_dict_ema` (unless `use_ema` is False), `state_dict`, `model`,
    or the file itself. Where Lightning's weight averaging was on, `state_dict` is the average and `current_model_state`
    has the raw weights. What wraps the network's own names (`module.`, `model.`, `backbone.` ...) is taken off, and of
    a larger model (a detector) only the backbone is read.

    Loading is strict, but for three cases that are logged once:

    - Into a feature pyramid the classifier and stages or norms that it was built without are ignored, and absent
      `outnorm*` (Vim: `up*`) keep their initialisation.
    - With another number of classes the classifier's linear layer is left out.
    - With other `in_chans` than the file's 3 the first convolution is adapted as timm does it (`adapt_input_conv`: for
      1 the sum over the colours, else the colours repeated and rescaled). With another `image_size` than the file's,
      the position embedding of a Vim is resized.

    Args:
        model: what `evmamba.create_model` returns.
        source: a file, or the mapping that such a file holds.
        use_ema: of a file with raw and averaged weights take the averaged ones.
        weights_only: refuse files that hold more than tensors and plain values. Unpickling anything else can run
            code: switch it off only for files whose author you trust.

    Raises:
        UserError: no such file, torn or foreign file, refused objects, weights that do not fit the model or are not
            finite.
    """
    where = "the given mapping" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_file(Path(source), weights_only=weights_only)
    slot, weights = _select_slot(content, use_ema, where)
    weights = model.checkpoint_filter_fn(_strip_wrappers(weights, model.STEMS, use_ema, where))
    adapted = model.adapted_to_input(weights)
    weights |= adapted
    expected = model.state_dict()
    left_out = _left_out(model, weights, expected)
    weights = {name: value for name, value in weights.items() if name not in left_out}
    kept = [n for n in expected if n not in weights and (n in left_out or n.startswith(model.PYRAMID_ONLY))]
    check_fit(weights, expected, where, kept)
    if broken := [name for name, value in weights.items() if not value.double().isfinite().all()]:
        raise UserError(f"{where} holds numbers that are not finite, in {len(broken)} tensors: {first_few(broken, 4)}")
    model.load_state_dict(weights, strict=False)
    done = Loaded(slot, left_out, kept, list(adapted))
    if left_out or kept or adapted:
        logger.warning(
            "%s: left out %s; kept as initialised: %s; adapted to the input: %s",
            where,
            *(first_few(names, 4) or "nothing" for names in done[1:]),
        )
    return done


def save_checkpoint(model: Backbone, path: str | os.PathLike[str], *, original_names: bool = False) -> None:
    """Write the weights as safetensors, atomically, with the model's name and sizes in the file's metadata.

    Args:
        model: what `evmamba.create_model` returns.
        path: the file; its folder must exist.
        original_names: write the parameter names of the original implementation in place of ours.

    Raises:
        UserError: the file cannot be written.
    """
    state = model.state_dict()
    if original_names:
        names = model.original_names()
        state = {names[name]: value for name, value in state.items()}
    described = {"variant": model.variant} | dataclasses.asdict(model.options)
    write_safetensors(state, Path(path), {"evmamba": json.dumps(described)})


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, readable for whoever may read new files here; whole or not at all.

    Args:
        state: of any strides and devices; what shares its memory is written for each of its names.
        path: the file; its folder must exist.
        metadata: of the file's header, beside the format.

    Raises:
        UserError: the file cannot be written.
    """
    plain, places = {}, set()
    for name, value in state.items():
        tensor = value.detach().contiguous().cpu()
        place = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if place in places else tensor  # safetensors refuses shared memory
        places.add(place)
    with write_errors(path), replacing(path) as partial:
        mode = partial.stat().st_mode
        safetensors.torch.save_file(plain, partial, metadata={"format": "pt", **(metadata or {})})
        partial.chmod(mode)  # safetensors leaves files that only their owner can read


def read_file(path: Path, *, weights_only: bool = True) -> Mapping[str, Any]:
    """Read what a safetensors or PyTorch file holds, on the CPU.

    Raises:
        UserError: no such file, torn or foreign file, or one that holds more than tensors (with `weights_only`).
    """
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for names that are too long)
        raise UserError(f"{path} is a folder; of a sharded checkpoint make one file: evmamba consolidate {path}")
    if not os.path.isfile(path):  # noqa: PTH113
        raise UserError(f"no checkpoint file at {path}")
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:9] == b"{":  # safetensors: the length of the header in 8 bytes, then the header as JSON
            return safetensors.torch.load_file(path)
        if start.startswith(b"PK"):
            with open_archive(path):  # before torch unpacks it
                pass
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        # Its text is torch's advice to read the file all the same.
        if weights_only and start[:2] in (b"PK", b"\x80\x02"):
            raise UserError(
                f"the checkpoint {path} holds Python objects besides tensors, and reading those could run code of "
                "whoever wrote it; it is not read: ask for the weights alone, as safetensors"
            ) from error
        raise _broken(path, "no pickle") from error
    except (ImportError, AttributeError) as error:
        raise UserError(f"the checkpoint {path} needs a Python package that is not installed: {error}") from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise _broken(path, first_line(error)[:120]) from error
    if isinstance(content, nn.Module):
        return content.state_dict()
    if not isinstance(content, Mapping):
        raise UserError(f"the checkpoint {path} holds a {type(content).__name__}, not a mapping of weights")
    return content


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """What `torch.save` wrote, as the archive that it is. Nothing in it is compressed, so it is as large as it looks.

    Raises:
        ValueError: it is no file, or another kind of archive, whose reading could fill the memory.
        OSError, zipfile.BadZipFile, NotImplementedError: it is torn, or none.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError("it is not a file")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch's own files are not")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts are said to be larger than the whole")
        yield archive


def _broken(path: Path, reason: str) -> UserError:
    return UserError(f"cannot read the checkpoint {path}: torn, or no checkpoint at all ({reason})")


def _select_slot(content: Mapping[str, Any], use_ema: bool, where: str) -> tuple[str, Mapping[str, Any]]:
    ema_slots, raw_slots = EMA_SLOTS, RAW_SLOTS
    if LIGHTNING_RAW_SLOT in content:
        ema_slots, raw_slots = ("state_dict",), (LIGHTNING_RAW_SLOT,)
    filled = [
        slot
        for slot in (*ema_slots, *raw_slots)
        if isinstance(content.get(slot), Mapping) and any(isinstance(v, Tensor) for v in content[slot].values())
    ]
    chosen = [slot for slot in filled if use_ema or slot not in ema_slots]
    if chosen:
        slot, weights = chosen[0], content[chosen[0]]
    elif filled:
        raise UserError(f"{where} has averaged weights only, in '{filled[0]}'; load it with use_ema=True")
    else:
        slot, weights = "", content
    weights = {name: value for name, value in weights.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not weights:
        found = ", ".join(sorted(map(str, content))[:8]) or "nothing"
        raise UserError(f"{where} has no weights: none in {', '.join((*ema_slots, *raw_slots))}, nor on top ({found})")
    return slot, weights


def _strip_wrappers(
    weights: Mapping[str, Tensor], stems: Iterable[str], use_ema: bool, where: str
) -> dict[str, Tensor]:
    """Take off the prefix before the network's own names; of a larger model keep only the names under that prefix."""
    stem = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, stems))})\.weight$")
    prefixes = [name[: found.start() + (found.group()[0] == ".")] for name in weights if (found := stem.search(name))]
    if len(prefixes) > 1:
        # A training checkpoint can hold a second, averaged copy of the network.
        prefixes = [prefix for prefix in prefixes if ("ema" in prefix.lower()) == use_ema]
        if len(prefixes) != 1:
            raise UserError(f"{where} holds several networks; pass the mapping of the one to load")
    prefix = prefixes[0] if prefixes else ""
    kept = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if len(kept) < len(weights):
        logger.warning("%s: read '%s*' only, %d other entries left out", where, prefix, len(weights) - len(kept))
    return kept


def _left_out(model: Backbone, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    if not hasattr(model, "head"):  # a feature pyramid
        return [name for name in weights if name not in expected and model.is_left_out(name)]
    linear = [name for name in (f"{model.CLASSIFIER}.weight", f"{model.CLASSIFIER}.bias") if name in weights]
    other_classes = any(name not in expected or len(weights[name]) != len(expected[name]) for name in linear)
    return linear if other_classes else []


def check_fit(weights: Mapping[str, Any], expected: Mapping[str, Any], where: str, kept: Iterable[str] = ()) -> None:
    """Compare the names and shapes of weights with a network's.

    Args:
        weights: to be loaded.
        expected: the network's `state_dict()`.
        where: the weights come from, for the message.
        kept: names that may be missing.

    Raises:
        UserError: they differ.
    """
    groups = {
        "missing": [name for name in expected if name not in weights and name not in kept],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(value.shape)} (model: {list(expected[name].shape)})"
            for name, value in weights.items()
            if isinstance(value, Tensor) and name in expected and value.shape != expected[name].shape
        ],
    }
    if any(groups.values()):
        listed = "; ".join(f"{len(names)} {kind}: {first_few(names, 4)}" for kind, names in groups.items() if names)
        raise UserError(f"{where} does not fit the model: {listed}")
