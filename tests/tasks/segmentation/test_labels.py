from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evmamba.errors import UserError
from evmamba.tasks.segmentation.labels import LabelMap, read_label

LABEL = np.array([[0, 1, 2], [3, 2, 200]], np.uint8)


def test_palette_files_hold_indices_and_their_colours_do_not_matter(tmp_path: Path):
    image = Image.fromarray(LABEL)
    image.putpalette([c for k in range(256) for c in (255 - k, (7 * k) % 256, 0)])
    assert image.mode == "P"
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_label(tmp_path / "p.png"), LABEL)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_files_of_few_bits_hold_the_numbers_as_stored(tmp_path: Path, bits: int):
    """Pillow stretches them to 0..255 on reading; written here by hand because it only writes 1 and 8."""
    label = LABEL & np.uint8(2**bits - 1)
    (tmp_path / "grey.png").write_bytes(_grey_png(label, bits))
    np.testing.assert_array_equal(read_label(tmp_path / "grey.png"), label)


@pytest.mark.parametrize(
    ("mode", "says"), [("RGB", "mode RGB"), ("RGBA", "mode RGBA"), ("I;16", "mode I;16"), ("LA", "mode LA")]
)
def test_colours_and_sixteen_bits_are_refused_by_name(tmp_path: Path, mode: str, says: str):
    path = tmp_path / "mask.png"
    Image.new(mode, (4, 4)).save(path)
    with pytest.raises(UserError, match=says) as error:
        read_label(path)
    assert str(path) in str(error.value)


def test_lossy_missing_and_damaged_files_are_refused(tmp_path: Path):
    Image.fromarray(LABEL).save(tmp_path / "jpeg.png", format="JPEG")
    with pytest.raises(UserError, match="is a JPEG"):
        read_label(tmp_path / "jpeg.png")
    with pytest.raises(UserError, match=r"label not found: .*none\.png"):
        read_label(tmp_path / "none.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:400])
    with pytest.raises(UserError, match=r"cannot read label .*half\.png"):
        read_label(tmp_path / "half.png")


def test_ade20k_numbering_is_the_default():
    labels = LabelMap(150)
    assert labels.to_index(np.array([0, 1, 150], np.uint8)).tolist() == [255, 0, 149]
    assert labels.to_file(np.array([0, 149])).tolist() == [1, 150]
    assert [labels.is_valid(v) for v in (0, 1, 150, 151, 255)] == [True, True, True, False, False]
    assert labels.range == "1..150"


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        ({"ignore_label": 0}, [255, 0, 1, 255]),
        ({"ignore_label": 255}, [0, 1, 2, 255]),  # another number to ignore: classes begin at 0
        ({"ignore_label": 255, "reduce_zero_label": True}, [255, 0, 1, 255]),
        ({"reduce_zero_label": False}, [0, 1, 2, 255]),
    ],
)
def test_numbering_options(options: dict, indices: list[int]):
    assert LabelMap(4, **options).to_index(np.array([0, 1, 2, 255], np.uint8)).tolist() == indices


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"num_classes": 256},
        {"num_classes": 3, "ignore_label": 256},
        {"num_classes": 3, "ignore_label": 2},
        {"num_classes": 3, "reduce_zero_label": False, "ignore_label": 0},
    ],
)
def test_contradicting_options_are_refused(options: dict):
    with pytest.raises(UserError, match=r"data\.(num_classes|ignore_label)"):
        LabelMap(**options)


def _grey_png(label: np.ndarray, bits: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b""
    for row in label:
        packed = "".join(f"{value:0{bits}b}" for value in row)
        packed += "0" * (-len(packed) % 8)
        rows += b"\0" + int(packed, 2).to_bytes(len(packed) // 8, "big")
    header = struct.pack(">IIBBBBB", label.shape[1], label.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
