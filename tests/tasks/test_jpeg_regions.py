"""A part of a JPEG is that of the whole image to the bit, whatever the file; damage is told as without it."""

import importlib.util
import io
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from evmamba.errors import UserError
from evmamba.tasks import jpeg_regions
from evmamba.tasks.images import Part, cut, read_image, read_jpeg, read_part, read_pixels
from evmamba.tasks.jpeg_regions import decode_region, is_one_whole_scan

needs_the_library = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None,
    reason="needs nvImageCodec",
)
# How Pillow writes them.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"subsampling": name} for name in ("4:4:4", "4:2:2", "4:2:0", "4:1:1")},
    "restarts": {"subsampling": "4:2:0", "restart_marker_blocks": 3},
    "restarts of rows": {"subsampling": "4:2:2", "restart_marker_rows": 1},
    "best": {"quality": 100, "subsampling": "4:2:0"},
    "RGB": {"keep_rgb": True},
    "comment": {"comment": b"\xff\xda\xff\xd9" * 9},
}


def photograph(height: int = 203, width: int = 149) -> Image.Image:
    """Edges and colours in every block: an error of a row, a column or a block shows."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 36, (height, width, 3))).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def parts(height: int, width: int) -> list[Part]:
    """The whole, the corners' pixels, and some drawn ones."""
    random.seed(0)
    drawn = []
    for _ in range(12):
        tall, wide = random.randint(1, height), random.randint(1, width)
        drawn.append((random.randint(0, height - tall), random.randint(0, width - wide), tall, wide))
    return [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), *drawn]


class Parts(Dataset[tuple[torch.Tensor, bool] | str]):
    """What a loading process reads of one file: (the pixels, whether a region decoder gives them too), or an error."""

    def __init__(self, content: bytes, wanted: list[Part]) -> None:
        self.content = content
        self.wanted = wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool] | str:
        part = self.wanted[index]
        stored = torch.frombuffer(bytearray(self.content), dtype=torch.uint8)
        try:
            pixels = read_part("a.jpg", lambda height, width: part, content=self.content)
        except UserError as error:
            return str(error)
        return pixels, decode_region(stored, *part) is not None


def loaded(content: bytes, wanted: list[Part]) -> list[Any]:
    return list(DataLoader(Parts(content, wanted), batch_size=None, num_workers=1))


@needs_the_library
@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_whole_to_the_bit(kind: str):
    content, wanted = jpeg(photograph(), **KINDS[kind]), parts(203, 149)
    whole = read_pixels("a.jpg", content=content)
    for part, (pixels, by_region) in zip(wanted, loaded(content, wanted), strict=True):
        assert by_region
        assert torch.equal(pixels, cut(whole, part)), part
        assert pixels.stride()[0] == 1  # a pixel's colours side by side


@needs_the_library
def test_parts_of_grey_images_have_three_colours():
    content, wanted = jpeg(photograph().convert("L")), parts(203, 149)
    whole = read_pixels("a.jpg", content=content)
    for part, (pixels, by_region) in zip(wanted, loaded(content, wanted), strict=True):
        assert by_region
        assert torch.equal(pixels, cut(whole, part))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_parts_are_of_the_upright_image(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(photograph(), exif=exif)
    whole = read_pixels("a.jpg", content=content)
    wanted = parts(*whole.shape[1:])
    for part, (pixels, _) in zip(wanted, loaded(content, wanted), strict=True):
        assert torch.equal(pixels, cut(whole, part))


@pytest.mark.parametrize("kind", ["progressive", "PNG", "CMYK"])
def test_what_has_no_regions_is_read_whole(kind: str):
    buffer = io.BytesIO()
    image = photograph().convert("CMYK") if kind == "CMYK" else photograph()
    image.save(buffer, "PNG" if kind == "PNG" else "JPEG", progressive=kind == "progressive")
    whole, wanted = read_pixels("a.jpg", content=buffer.getvalue()), parts(203, 149)
    if kind == "progressive":
        assert not is_one_whole_scan(np.frombuffer(buffer.getvalue(), np.uint8))
    for part, (pixels, _) in zip(wanted, loaded(buffer.getvalue(), wanted), strict=True):
        assert torch.equal(pixels, cut(whole, part))


@pytest.mark.parametrize("damage", ["cut off", "marker"])
def test_damage_below_the_part_is_told(damage: str):
    """As for the whole image: a decoder that stops below the part would not come to it."""
    content = bytearray(jpeg(photograph()))
    if damage == "cut off":
        content = content[: len(content) * 3 // 4]
    else:
        place = len(content) * 3 // 4
        content[place : place + 2] = b"\xff\x67"
    with pytest.raises(UserError, match=r"a\.jpg"):
        read_image("a.jpg", content=bytes(content))
    for found in loaded(bytes(content), [(0, 0, 20, 20), (150, 0, 20, 20)]):
        assert isinstance(found, str)
        assert "a.jpg" in found


@needs_the_library
def test_random_damage_never_shows_what_the_whole_image_would_not():
    """Bytes of the codes replaced: the same pixels as the whole image where that can be read, else the same refusal."""
    good, rng = jpeg(photograph(), subsampling="4:2:0"), random.Random(0)
    start = good.index(b"\xff\xda")
    regions = 0
    for _ in range(40):
        content = bytearray(good)
        for place in rng.sample(range(start + 16, len(good) - 2), rng.choice([1, 3, 40])):
            content[place] = rng.randrange(256)
        wanted = parts(203, 149)[3:7]
        try:
            whole = read_pixels("a.jpg", content=bytes(content))
        except UserError:
            whole = None
        for part, found in zip(wanted, loaded(bytes(content), wanted), strict=True):
            if whole is None:
                assert isinstance(found, str)
            else:
                assert torch.equal(found[0], cut(whole, part))
                regions += found[1]
    assert regions > 40  # else nothing was tried


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x00" * 50, bytes(1000)])
def test_scans_are_not_found_in_nonsense(content: bytes):
    assert not is_one_whole_scan(np.frombuffer(content, np.uint8))


def test_only_loading_processes_use_it():
    """A fork of a process that has decoded would wait for ever for a thread that only its parent has."""
    found = read_jpeg("a.jpg", content=jpeg(photograph()))
    assert found is not None
    assert decode_region(found.content, 0, 0, 9, 9) is None
    assert not hasattr(jpeg_regions._own, "decoder")


@needs_the_library
def test_it_starts_without_a_word_about_gpus(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(jpeg(photograph()))
    code = (
        "import multiprocessing; multiprocessing.current_process()._config['daemon'] = True\n"
        "from evmamba.tasks.images import read_jpeg\n"
        "from evmamba.tasks.jpeg_regions import decode_region\n"
        "print(decode_region(read_jpeg('a.jpg').content, 1, 2, 3, 4).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([3, 3, 4])\n"
    assert done.stderr == ""


def test_where_it_is_not_installed_nothing_is_said(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    assert jpeg_regions._start() is None
    assert not recwarn.list


def test_a_library_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", types.ModuleType("nvidia.nvimgcodec"))
    with pytest.warns(UserWarning, match="nvImageCodec does not work here, so whole images are decoded"):
        assert jpeg_regions._start() is None
