"""Image files of every kind are read the way a person sees them; bad ones are named."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from evmamba.errors import UserError
from evmamba.tasks import images
from evmamba.tasks.images import (
    check_decoder,
    decode_jpegs,
    find_unreadable,
    handle_unreadable,
    is_image_file,
    read_image,
    read_jpeg,
    read_pixels,
    turn_upright,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixel(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = read_image(path)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def photo(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_rgb_comes_back_unchanged_and_file_is_closed(tmp_path: Path):
    photo().save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        assert np.array_equal(read_image(tmp_path / "a.png"), photo())


def test_grayscale(tmp_path: Path):
    Image.new("L", (4, 4), 77).save(tmp_path / "a.jpg")
    assert pixel(tmp_path / "a.jpg") == (77, 77, 77)


def test_palette(tmp_path: Path):
    image = Image.new("P", (4, 4), 3)
    image.putpalette([0, 0, 0] * 3 + list(RED))
    image.save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == RED


def test_transparent_palette_entry_shows_white(tmp_path: Path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, 0, 0, 0])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=1)
    assert pixel(tmp_path / "a.png") == RED
    assert pixel(tmp_path / "a.png", 2, 2) == WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # a fifth of red over white
        ("LA", (0, 255), (0, 0, 0)),
        ("LA", (0, 0), WHITE),
    ],
)
def test_alpha_is_composited_over_white(tmp_path: Path, mode: str, colour: tuple, expected: tuple):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == expected


def test_single_transparent_colour_shows_white(tmp_path: Path):
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), RED)
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixel(tmp_path / "a.png") == RED
    assert pixel(tmp_path / "a.png", 2, 2) == WHITE


def test_cmyk_jpeg_with_adobe_marker_is_not_a_negative(tmp_path: Path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)  # full magenta and yellow: red
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert np.abs(np.subtract(pixel(tmp_path / "a.jpg", 8, 8), RED)).max() < 12


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pixels_for_training_are_those_of_the_image(tmp_path: Path, mode: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().convert(mode).save(tmp_path / "a.jpg", exif=exif)
    pixels = read_pixels(tmp_path / "a.jpg")
    expected = np.asarray(read_image(tmp_path / "a.jpg"))
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0), expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_pixels_for_training_come_from_memory_too_and_damage_is_told(tmp_path: Path, name: str):
    photo().save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert np.array_equal(
        read_pixels("in a shard", content=content).permute(1, 2, 0), np.asarray(read_image(tmp_path / name))
    )
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name):
        read_pixels(tmp_path / name)
    with pytest.raises(UserError, match="not found"):
        read_pixels(tmp_path / "absent.jpg")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grayscale_is_scaled_not_clipped(tmp_path: Path, suffix: str):
    values = np.array([[0, 257, 32896], [65535, 1000, 300]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    assert np.asarray(read_image(tmp_path / f"a.{suffix}"))[..., 0].tolist() == [[0, 1, 128], [255, 4, 1]]


def test_bilevel(tmp_path: Path):
    Image.new("1", (4, 4), 1).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == WHITE


def test_exif_orientation_is_applied(tmp_path: Path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste(RED, (0, 0, 10, 10))  # top left, stored
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").size == (20, 40)
    assert pixel(tmp_path / "a.png", 19, 0) == RED
    assert pixel(tmp_path / "a.png", 0, 0) == WHITE


def test_format_is_told_by_content_not_by_name(tmp_path: Path):
    photo().save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), photo())


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    photo().save(buffer, format=format)
    return buffer.getvalue()


BAD = {
    "empty.jpg": b"",
    "text.jpg": b"this is not an image",
    "half.jpg": encoded("JPEG")[: len(encoded("JPEG")) // 2],
    "half.png": encoded("PNG")[: len(encoded("PNG")) // 2],
    "half.webp": encoded("WEBP")[:300],
    "half.bmp": encoded("BMP")[:500],
    "half.tiff": encoded("TIFF")[:500],
}


@pytest.mark.parametrize("name", list(BAD))
def test_unreadable_file_is_named_in_one_line(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(UserError, match=name) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"image not found: .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="cannot read image"):
        read_image(tmp_path)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photo().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"a\.png.*bomb"):
        read_image(tmp_path / "a.png")


def test_floating_point_pixels_are_refused(tmp_path: Path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*floating-point"):
        read_image(tmp_path / "a.tif")


def test_damaged_exif_does_not_lose_the_picture(tmp_path: Path):
    photo().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert read_image(tmp_path / "a.jpg").size == (60, 40)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_check_finds_exactly_the_bad_files(tmp_path: Path, policy: str):
    for suffix in ("jpg", "png", "webp", "bmp", "tiff"):
        photo().save(tmp_path / f"good.{suffix}")
    (tmp_path / "trailing.jpg").write_bytes(encoded("JPEG") + bytes(500))  # complete, with bytes of a camera behind
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    bad = find_unreadable(sorted(tmp_path.iterdir()), policy)
    assert {path.name for path in bad} == set(BAD)
    assert all(path.name in reason for path, reason in bad.items())


def test_policy_stop_names_the_first_and_counts():
    bad = {Path(f"{k}.jpg"): f"cannot read image {k}.jpg: truncated" for k in range(5)}
    with pytest.raises(UserError, match=r"5 of 9 train images cannot be read: .*0\.jpg.* and 2 more; .*skip"):
        handle_unreadable(bad, 9, "stop", "train")
    with pytest.warns(UserWarning, match=r"5 of 9 train images .* left out"):
        handle_unreadable(bad, 9, "skip", "train")
    with pytest.raises(UserError, match="nothing is left"):
        handle_unreadable(bad, 5, "skip", "train")


def test_suffixes_in_any_case_and_hidden_files():
    good = ["a.jpg", "a.JPG", "a.Jpeg", "a.png", "a.webp", "a.BMP", "a.tif", "a.TIFF"]
    assert all(is_image_file(Path(name)) for name in good)
    assert not any(is_image_file(Path(name)) for name in ["a.txt", ".a.jpg", "jpg", "a.json", "._a.png"])


class Reading(Dataset):
    """Images of a list of files."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])


def test_an_image_broken_inside_is_one_line_from_a_loading_process(tmp_path: Path):
    """The check before training looks at header and end, so this one is found only when it is read."""
    path = tmp_path / "inside.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[2000:4000] = bytes(2000)
    path.write_bytes(content)
    assert find_unreadable([path], "stop") == {}
    with pytest.raises(UserError) as error:
        next(iter(DataLoader(Reading([path]), num_workers=1)))
    assert str(error.value).startswith(f"cannot read image {path}: ")
    assert "\n" not in str(error.value)


CPU = torch.device("cpu")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_that_is_decoded_later_is_upright(tmp_path: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo().save(tmp_path / "a.jpg", exif=exif)
    jpeg = read_jpeg(tmp_path / "a.jpg")
    assert jpeg is not None
    (stored,) = decode_jpegs([jpeg.content], CPU)
    assert stored is not None
    upright = turn_upright(stored, jpeg.orientation)
    assert upright.shape == (3, jpeg.height, jpeg.width)
    assert torch.equal(upright, read_pixels(tmp_path / "a.jpg", exact=True))


def test_what_is_no_jpeg_in_grey_or_colour_is_not_decoded_later(tmp_path: Path):
    photo().save(tmp_path / "a.png")
    photo().convert("CMYK").save(tmp_path / "b.jpg")
    assert [read_jpeg(tmp_path / name) for name in ("a.png", "b.jpg", "missing.jpg")] == [None] * 3


def test_a_jpeg_that_the_decoder_refuses_does_not_hinder_the_others(tmp_path: Path):
    photo().save(tmp_path / "a.jpg")
    whole = read_jpeg(tmp_path / "a.jpg")
    assert whole is not None
    first, torn, last = decode_jpegs([whole.content, whole.content[:300], whole.content], CPU)
    assert first is not None
    assert torn is None
    assert torch.equal(first, last)
    assert decode_jpegs([], CPU) == []


def test_a_device_without_decoder_is_one_line(monkeypatch: pytest.MonkeyPatch):
    check_decoder(CPU, "data.augment_on=device")
    with pytest.raises(UserError, match=r"data\.augment_on=device: .* not on mps"):
        check_decoder(torch.device("mps"), "data.augment_on=device")

    def refuse(*_: object, device: torch.device) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(images, "decode_jpeg", refuse)
    with pytest.raises(UserError, match=r"cannot decode JPEGs on cuda .*nvJPEG support\); leave it out") as caught:
        check_decoder(torch.device("cuda"), "data.augment_on=device")
    assert "\n" not in str(caught.value)
