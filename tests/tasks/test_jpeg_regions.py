"""A region of a JPEG is that of the whole image to the bit, whatever the file; damage is told as without it."""

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

from evmamba.errors import UserError
from evmamba.tasks import images, jpeg_regions
from evmamba.tasks.images import Region, cut, read_image, read_pixels, read_region
from evmamba.tasks.jpeg_regions import LEAST_PIXELS, LEAST_WIDTH, Frame, decode_region, find_frame

needs_the_library = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvimgcodec") is None,
    reason="needs nvImageCodec",
)
HEIGHT, WIDTH = 403, 349
# How Pillow writes them.
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"subsampling": name} for name in ("4:4:4", "4:2:2", "4:2:0")},
    "restarts": {"subsampling": "4:2:0", "restart_marker_blocks": 3},
    "restarts of rows": {"subsampling": "4:2:2", "restart_marker_rows": 1},
    "best": {"quality": 100, "subsampling": "4:2:0"},
    "RGB": {"keep_rgb": True},
    "comment": {"comment": b"\xff\xda\xff\xd9" * 9},
}


def photograph(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A ramp, and as much noise as there can be in the right half: an error of a row, a column or a block shows."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 160, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    pixels = ramp + rng.integers(0, 36, (height, width, 3))
    pixels[:, width // 2 :] = rng.integers(0, 256, (height, width - width // 2, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def stored(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", "quality": 90, **options})
    return buffer.getvalue()


def regions(height: int = HEIGHT, width: int = WIDTH) -> list[Region]:
    """The whole, its corners, the narrowest ones at every kind of column, and some drawn ones."""
    random.seed(0)
    drawn = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (0, 0, height, 1)]
    drawn += [
        (3, left, 9, LEAST_WIDTH) for left in (*range(18), *range(width - LEAST_WIDTH - 17, width - LEAST_WIDTH + 1))
    ]
    for _ in range(12):
        tall, wide = random.randint(1, height), random.randint(1, width)
        drawn.append((random.randint(0, height - tall), random.randint(0, width - wide), tall, wide))
    return drawn


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether nvImageCodec gave it, of every region that was asked for."""
    answers: list[bool] = []

    def decode(*arguments: Any) -> torch.Tensor | None:
        region = decode_region(*arguments)
        answers.append(region is not None)
        return region

    monkeypatch.setattr(images, "decode_region", decode)
    return answers


def run(code: str, folder: Path) -> tuple[int, str, str]:
    """Python's status and what it prints, beside the photograph `a.jpg`."""
    (folder / "a.jpg").write_bytes(stored(photograph()))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


def check(content: bytes, every: int = 1) -> None:
    """Of every region (or some), the pixels of the whole image."""
    whole = read_pixels("a.jpg", content=content)
    for region in regions(*whole.shape[1:])[::every]:
        pixels = read_region("a.jpg", lambda height, width, region=region: region, content=content)
        assert torch.equal(pixels, cut(whole, region)), region
        assert pixels.stride()[0] <= 1  # a pixel's colours side by side, or one for all three


@needs_the_library
@pytest.mark.parametrize("kind", [*KINDS, "grey"])
def test_regions_are_those_of_the_whole_to_the_bit(kind: str, decoded: list[bool]):
    check(stored(photograph().convert("L")) if kind == "grey" else stored(photograph(), **KINDS[kind]))
    assert decoded == [region[3] >= LEAST_WIDTH for region in regions()]


@needs_the_library
@pytest.mark.parametrize(
    ("subsampling", "factors"), [("4:2:0", 0x41), ("4:2:2", 0x12), ("4:2:0", 0x14)], ids=["4:1:1", "4:4:0", "1x4"]
)
def test_samplings_that_pillow_does_not_write(subsampling: str, factors: int, decoded: list[bool]):
    """Of as many blocks a unit, so that the codes of another sampling are some image of this one."""
    content = bytearray(stored(photograph(512, 512), subsampling=subsampling))
    place = content.index(b"\xff\xc0") + 11
    assert content[place] in (0x22, 0x21)
    content[place] = factors
    check(bytes(content))
    assert any(decoded)


@needs_the_library
@pytest.mark.parametrize("width", range(352, 368))
def test_whatever_the_width_of_the_image(width: int, decoded: list[bool]):
    check(stored(photograph(375, width), subsampling="4:2:0"))
    assert any(decoded)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_are_of_the_upright_image(orientation: int, mode: str, decoded: list[bool]):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(photograph().convert(mode), exif=exif)
    check(content)
    assert bool(decoded) == (orientation == 1)  # the others are decoded whole
    assert np.array_equal(read_pixels("a.jpg", content=content).permute(1, 2, 0), read_image("", content=content))


XMP = (
    b'http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/>'
    b"</x:xmpmeta>"
)
# Pillow takes no orientation from the two, torchvision turns the image: the value is a byte, the header ends in 255.
TIFF = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00%c\x00\x00\x00\x01%b\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "segment",
    [XMP, b"Exif\x00\x00" + TIFF % (1, b"\x06\x00\x00\x00"), b"Exif\x00\xff" + TIFF % (3, b"\x00\x06\x00\x00")],
    ids=["XMP", "byte", "header"],
)
def test_the_orientation_is_the_one_that_pillow_reads(segment: bytes):
    """As evaluation does; torchvision reads other ones, and a region of an image turned otherwise may not exist."""
    plain = stored(photograph())
    content = plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]
    check(content)
    assert np.array_equal(read_pixels("a.jpg", content=content).permute(1, 2, 0), read_image("", content=content))


@pytest.mark.parametrize("kind", ["progressive", "PNG", "CMYK", "small"])
def test_others_are_decoded_whole(kind: str, decoded: list[bool]):
    image = photograph(300, 200) if kind == "small" else photograph().convert("CMYK" if kind == "CMYK" else "RGB")
    content = stored(image, format="PNG" if kind == "PNG" else "JPEG", progressive=kind == "progressive")
    check(content)
    assert not any(decoded)
    assert image.width * image.height >= LEAST_PIXELS or kind == "small"


def test_one_scan_of_a_progressive_image_is_none_of_its_regions():
    """As of a file that was cut off and closed: decoders smooth what it lacks, at a region's edge in another way."""
    content = stored(photograph(), progressive=True)
    found = jpeg_regions.MARKER.search(content, content.index(b"\xff\xda") + 2)
    assert found is not None
    first = content[: found.start()] + b"\xff\xd9"
    check(first)
    assert find_frame(first) is None


@pytest.mark.parametrize("damage", ["cut off", "marker"])
def test_damage_below_the_region_is_told(damage: str):
    """As for the whole image: a decoder that stops below the region would not come to it."""
    content = bytearray(stored(photograph()))
    place = len(content) * 3 // 4
    if damage == "cut off":
        del content[place:]
    else:
        content[place : place + 2] = b"\xff\x67"
    for region in [(0, 0, 20, 20), (350, 0, 20, 20)]:
        with pytest.raises(UserError, match=r"a\.jpg"):
            read_region("a.jpg", lambda height, width, region=region: region, content=bytes(content))


@needs_the_library
def test_damaged_codes_show_what_the_whole_image_would(decoded: list[bool]):
    """Bytes replaced: the same pixels as the whole image where that can be read, else the same refusal."""
    good, rng = stored(photograph(), subsampling="4:2:0"), random.Random(0)
    start, refused = good.index(b"\xff\xda"), 0
    for _ in range(60):
        content = bytearray(good)
        length = rng.choice([1, 40, 400])
        place = rng.randrange(start + 16, len(good) - 2 - length)
        content[place : place + length] = rng.randbytes(length)
        try:
            read_pixels("a.jpg", content=bytes(content))
        except UserError as error:
            refused += 1
            with pytest.raises(UserError, match=str(error)[:30]):
                read_region("a.jpg", lambda height, width: (0, 0, 50, 50), content=bytes(content))
        else:
            check(bytes(content), every=5)
    assert 5 < refused < 55
    assert sum(decoded) > 200


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x00" * 50, bytes(1000), b"\xff\xd8" + b"\xff" * 5000]
)
def test_scans_are_not_found_in_nonsense(content: bytes):
    assert find_frame(content) is None


def segment_of(content: bytes, kind: int) -> int:
    """Where the first segment of a kind begins."""
    return content.index(b"\xff" + bytes([kind]))


def test_a_frame_is_what_pillow_reads_of_the_header():
    exif = Image.Exif()
    exif[0x0112] = 3
    for mode, options in (("RGB", {}), ("L", {}), ("RGB", {"exif": exif}), ("RGB", {"comment": b"\xff\xc0" * 20})):
        content = stored(photograph(70, 50).convert(mode), **options)
        with Image.open(io.BytesIO(content)) as image:
            assert find_frame(content) == Frame(image.height, image.width, "exif" in options)


# Bytes after 0xFF without a length, behind which another decoder would find another segment: filling, nothing, TEM, a
# restart, another start.
LENGTHLESS = {f"{kind:02x}": bytes([0xFF, kind]) for kind in (0xFF, 0x00, 0x01, 0xD0, 0xD8)}


@pytest.mark.parametrize(
    "change", ["no height", "12 bits", "two colours", "second frame", "no frame", "no start", *LENGTHLESS]
)
def test_frames_that_no_region_is_decoded_of(change: str):
    content = bytearray(stored(photograph()))
    place = segment_of(content, 0xC0)
    length = 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    assert find_frame(bytes(content)) == Frame(HEIGHT, WIDTH, False)
    if change == "no height":
        content[place + 5 : place + 7] = bytes(2)
    elif change == "12 bits":
        content[place + 4] = 12
    elif change == "two colours":
        content[place + 9] = 2
    elif change == "second frame":
        content[place:place] = content[place : place + length]
    elif change == "no frame":
        del content[place : place + length]
    elif change in LENGTHLESS:
        content[2:2] = LENGTHLESS[change]
    else:
        del content[0]
    assert find_frame(bytes(content)) is None


def test_of_a_size_that_no_photograph_has_nothing_is_decoded(decoded: list[bool]):
    """Pillow refuses it; a region alone would take gigabytes."""
    content = bytearray(stored(photograph()))
    place = segment_of(content, 0xC0)
    content[place + 5 : place + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(UserError, match="exceeds limit"):
        read_region("a.jpg", lambda height, width: (0, 0, height, width), content=bytes(content))
    assert not decoded


@needs_the_library
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_largest_photographs_are_decoded_by_regions_too(monkeypatch: pytest.MonkeyPatch, decoded: list[bool]):
    """Of those beyond its limit Pillow warns, of those twice as large it reads none."""
    content = stored(photograph())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    check(content, every=9)
    assert any(decoded)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    with pytest.raises(UserError, match="exceeds limit"):
        check(content)


@needs_the_library
def test_pillow_is_asked_only_where_an_image_may_be_turned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "read_jpeg", lambda *_, **__: pytest.fail("asked"))
    pixels = read_region("a.jpg", lambda height, width: (0, 0, height, width), content=stored(photograph()))
    assert pixels.shape == (3, HEIGHT, WIDTH)


def test_without_the_library_the_file_is_not_looked_through(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jpeg_regions, "_decoder", lambda: None)
    monkeypatch.setattr(images, "find_frame", lambda _: pytest.fail("looked through"))
    check(stored(photograph()), every=9)


@pytest.mark.parametrize("name", ["a.jpg", "a\0b.jpg"])
def test_a_file_that_cannot_be_read_is_told(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"not found|cannot read"):
        read_region(tmp_path / name, lambda height, width: (0, 0, 1, 1))


@needs_the_library
def test_processes_forked_after_it_decode_too_and_nothing_is_said_about_gpus(tmp_path: Path):
    """With a pool of threads they would wait for ever for those that only their parent has."""
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from evmamba.tasks.jpeg_regions import decode_region\n"
        "decode = lambda: decode_region(Path('a.jpg').read_bytes(), 10, 20, 30, 40)\n"
        "assert decode().shape == (3, 30, 40)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if decode().shape == (3, 30, 40) else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert decode().shape == (3, 30, 40)\n"
    )
    assert run(code, tmp_path) == (0, "", "")


@needs_the_library
def test_threads_that_start_at_once_decode_and_leave_the_errors_their_way(tmp_path: Path):
    code = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from evmamba.tasks.jpeg_regions import decode_region\n"
        "content, shapes, barrier = Path('a.jpg').read_bytes(), [], threading.Barrier(8)\n"
        "def decode():\n"
        "    barrier.wait()\n"
        "    shapes.append(decode_region(content, 10, 20, 30, 40).shape)\n"
        "threads = [threading.Thread(target=decode) for _ in range(8)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "assert shapes == [(3, 30, 40)] * 8\n"
        "print('here', file=sys.stderr)\n"
    )
    assert run(code, tmp_path) == (0, "", "here\n")


def test_where_it_is_not_installed_nothing_is_said(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    assert jpeg_regions._start() is None
    assert not recwarn.list


@needs_the_library
@pytest.mark.parametrize("lacking", ["Decoder", "Region", "pixels", "part"])
def test_a_library_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch, lacking: str):
    """Without what is called, with other pixels, or without a part of its own."""
    codec = importlib.import_module("nvidia.nvimgcodec")
    other = types.ModuleType("nvidia.nvimgcodec")
    vars(other).update({name: value for name, value in vars(codec).items() if name != lacking})
    if lacking == "pixels":
        other.Region = lambda top, left, *end: codec.Region(top + 1, left, end[0] + 1, end[1])  # type: ignore[attr-defined]
    if lacking == "part":
        monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError("no impl")))
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", other)
    with pytest.warns(UserWarning, match="nvImageCodec does not work here, so whole images are decoded"):
        assert jpeg_regions._start() is None
