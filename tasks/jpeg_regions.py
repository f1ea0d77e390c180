"""A part of a JPEG without the rest, by nvImageCodec on a CPU: libjpeg-turbo's partial decoding.

Of what lies above the part only the codes are read, of what lies below it nothing. The pixels are those of the whole
image, to the bit.

Loading processes alone do it. nvImageCodec decodes in a thread of its own, which a forked process lacks: a child of one
that has decoded waits for it for ever. Loading processes have no children.
"""

import importlib
import multiprocessing
import os
import struct
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# nvImageCodec's NVIMGCODEC_DEVICE_CPU_ONLY, for which its Python package has no name.
NO_GPU = -99999
# As other decoders do, and as :func:`evmamba.tasks.images.turn_upright` expects: orientation is the caller's.
AS_STORED = {"apply_exif_orientation": False}
# libjpeg-turbo's own default, and everybody's.
OPTIONS = ":fancy_upsampling=1"

# Markers of a JPEG (ITU-T T.81, table B.1), the byte after 0xFF.
RESTARTS = (0xD0, 0xD7)
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA

_own = threading.local()  # a decoder is one thread's


def decode_region(content: Tensor, top: int, left: int, height: int, width: int) -> Tensor | None:
    """Decode a part of a grey or colour JPEG as it is stored.

    Args:
        content: the file's bytes, uint8 [n].
        top, left, height, width: the part, in pixels, within the image.

    Returns:
        uint8 [3, height, width], the colours of a pixel side by side in memory; None outside of loading processes,
        where nvImageCodec is not installed, and for what :func:`is_one_whole_scan` or the library refuses.
    """
    if not multiprocessing.current_process().daemon:
        return None
    codec, stored = _codec(), content.numpy()
    if codec is None or not is_one_whole_scan(stored):
        return None
    region = codec.Region(top, left, top + height, left + width)
    image = _own.decoder.decode(
        codec.CodeStream(stored).get_sub_code_stream(region=region), params=codec.DecodeParams(**AS_STORED)
    )
    return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)


def is_one_whole_scan(content: np.ndarray) -> bool:
    """Whether a JPEG has all its pixels in one scan, which goes on to the end of the image.

    A decoder that stops below a part does not see that a file is damaged or cut off there, and takes a marker that has
    no place in a scan for its end: grey follows. Of several scans (progressive) all are needed, so nothing is saved.

    Args:
        content: the file's bytes, uint8 [n].
    """
    place = 2  # of the first marker after that of the image's start
    try:
        while (segment := struct.unpack_from(">BBH", content.data, place))[1] != START_OF_SCAN:
            place += 2 + segment[2]
    except struct.error:
        return False
    scan = content[place + 2 + segment[2] :]
    after = scan[np.flatnonzero(scan[:-1] == 0xFF) + 1]
    # 0: a byte of the codes that is 0xFF; 0xFF: filling before a marker.
    markers = after[(after != 0) & (after != 0xFF) & ((after < RESTARTS[0]) | (after > RESTARTS[1]))]
    return len(markers) > 0 and markers[0] == END_OF_IMAGE


def _codec() -> Any:
    """nvImageCodec with this thread's decoder in `_own`; None where there is none."""
    if not hasattr(_own, "codec"):
        _own.codec = _start()
    return _own.codec


def _start() -> Any:
    try:
        with _silent():
            nvimgcodec = importlib.import_module("nvidia.nvimgcodec")
        _own.decoder = nvimgcodec.Decoder(
            device_id=NO_GPU,
            max_num_cpu_threads=1,
            backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
            options=OPTIONS,
        )
    except ModuleNotFoundError:
        return None
    except Exception as error:  # of a library that does not fit: RuntimeError, ImportError, AttributeError, ...
        warnings.warn(f"nvImageCodec does not work here, so whole images are decoded: {error}", stacklevel=2)
        return None
    return nvimgcodec


@contextmanager
def _silent() -> Iterator[None]:
    """Send what the library's parts print on loading, that there is no GPU's decoder, nowhere."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # damaged files are told by us
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
