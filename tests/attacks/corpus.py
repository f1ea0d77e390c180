"""Hostile variants of sound files, by kind of file. Each is a function of the file's path, or of where to put it."""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

Attack = Callable[[Path], None]

DIGITS = "9" * 5000
# Values for where something else is expected.
ODD: list[Any] = [
    None, True, -1, 0, 2**63, 10**30, 0.5, -0.0, 1e308, "", "1", "x" * 5000, "\x1b[31mred\x1b[0m", "\u202eleft",
    "a\nb", "../../secret.png", "/etc/passwd", "<script>alert(1)</script>", "=1+1", "$(touch ran)", "--help",
    "os.system", "\\input{secret}", "$x^{", [], {}, [[]], [None], {"a": {}}, [1, 2], {"": []},
]  # fmt: skip


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


# What may stand where a file should be.


def absent(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00\x81" * 20)


PLACES: list[Attack] = [folder, pipe, absent, loop, dangling, endless, empty, no_text]


# Bytes that changed.


def cut(share: float) -> Attack:
    def attack(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return attack


def flipped(seed: int, count: int = 8) -> Attack:
    def attack(path: Path) -> None:
        content, rng = bytearray(path.read_bytes()), random.Random(seed)
        for _ in range(count):
            # Most of a file is tensors or pixels; what is read first stands at its ends.
            place = rng.choice(
                [rng.randrange(len(content)), rng.randrange(min(512, len(content))), -rng.randint(1, 64)]
            )
            content[place % len(content)] = rng.randrange(256)
        path.write_bytes(content)

    return attack


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


# JSON and YAML.


def text(content: str) -> Attack:
    return lambda path: path.write_text(content) and None


JSON: list[Attack] = [
    text("[" * 200_000),
    text('{"a":' * 200_000),
    text("[" * 200_000 + "]" * 200_000),
    text(f"[{DIGITS}]"),
    text('{"schema": ' + DIGITS + "}"),
    text("NaN"),
    text('["\\ud800"]'),
    text("null"),
    text("[]"),
    text("{}"),
    text('"text"'),
    text("3"),
]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
YAML: list[Attack] = [
    text(BOMB),
    text("a: &a [*a]"),
    text("a: !!python/object/apply:os.system ['touch ran']"),
    text("[" * 5000),
    text("{" * 5000),
    text("a: [" + DIGITS + "]"),
    text("a: 2024-99-99"),
    text("? [a]\n: b"),
    text("\x00"),
    text("- 1"),
    text("text"),
    text("null"),
]


def replaced(tree: Any, place: int, value: Any) -> Any:
    """A copy of a tree of lists and mappings with another value at the `place`-th of its nodes."""
    nodes = list(_nodes(tree, ()))
    path = nodes[place % len(nodes)]
    return _with(tree, path, value)


def removed(tree: Any, place: int) -> Any:
    """A copy without the `place`-th of its entries."""
    nodes = [path for path in _nodes(tree, ()) if path]
    *above, last = nodes[place % len(nodes)]
    parent = tree
    for key in above:
        parent = parent[key]
    kept = [entry for k, entry in enumerate(parent) if k != last] if isinstance(parent, list) else {
        key: entry for key, entry in parent.items() if key != last
    }  # fmt: skip
    return _with(tree, tuple(above), kept)


def _nodes(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _nodes(value, (*path, key))
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from _nodes(value, (*path, key))


def _with(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(tree, dict):
        return {key: _with(entry, tuple(rest), value) if key == first else entry for key, entry in tree.items()}
    return [_with(entry, tuple(rest), value) if k == first else entry for k, entry in enumerate(tree)]


def edited(kind: str, change: Callable[[Any], Any]) -> Attack:
    """Read a file of a kind, change what it holds, and write it back."""

    def attack(path: Path) -> None:
        if kind == "json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        elif kind == "yaml":
            path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text()))))
        else:
            torch.save(change(torch.load(path, weights_only=True)), path)

    return attack


# Checkpoints.


def payload(marker: Path) -> list[Attack]:
    """Pickles that run something, alone and within an archive of torch's."""

    def bare(path: Path) -> None:
        path.write_bytes(pickle.dumps(Payload(marker)))

    def inside(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(content | {"more": Payload(marker)}, path)

    def legacy(path: Path) -> None:
        torch.save(Payload(marker), path, _use_new_zipfile_serialization=False)

    return [bare, inside, legacy]


def deflated(path: Path) -> None:
    """A thousandth of the size, until torch unpacks it."""
    torch.save({"state_dict": {"w": torch.zeros(2**24)}}, path)
    whole = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(whole) as entries, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in entries.namelist():
            small.writestr(entry, entries.read(entry))


def tensors_for_all(path: Path) -> None:
    """Terabytes that are one number in the file."""
    content = torch.load(path, weights_only=True)
    huge = torch.zeros(1).expand(2**40)
    content["state_dict"] = dict.fromkeys(content.get("state_dict", {"w": 0}), huge)
    torch.save(content, path)


def long_header(path: Path) -> None:
    """Of a safetensors file."""
    path.write_bytes(struct.pack("<Q", 2**62) + b"{" + b" " * 100)


CHECKPOINTS: list[Attack] = [deflated, tensors_for_all, long_header]


# Tar shards.


def header(name: str = "ant/0.png", size: bytes = b"00000000005\0", kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """A tar header with its checksum; `size` as it stands there, 12 bytes."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[156:157] = kind
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int) -> bytes:
    """A size beyond octal digits."""
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)


def members(*parts: bytes) -> Attack:
    return lambda path: path.write_bytes(b"".join(parts) + bytes(1024)) and None


def packed(name: str, label: bytes = b"0", suffix: str = ".cls", more: dict[str, str] | None = None) -> Attack:
    """One sound image with such a name and label, beside what is there."""

    def attack(path: Path) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (40, 40)).save(picture, "PNG")
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
            for entry, content in ((f"{name}.png", picture.getvalue()), (f"{name}{suffix}", label)):
                member = tarfile.TarInfo(entry)
                member.size = len(content)
                member.pax_headers = more or {}
                archive.addfile(member, io.BytesIO(content))

    return attack


SHARDS: list[Attack] = [
    members(header(size=b"77777777777\0")),
    members(header("ant/0.cls", size=b"77777777777\0")),
    members(header(size=base256(2**80))),
    members(header(size=base256(-512))),
    members(header(size=base256(-(2**80)))),
    members(header(kind=b"L", size=b"77777777777\0")),
    members(header(kind=b"x", size=b"77777777777\0")),
    members(header(kind=b"x", size=base256(-1024))),
    members(*[header(kind=b"L", size=b"00000000000\0")] * 3000),
    members(header(kind=b"S", size=b"77777777777\0")),
    members(header(kind=b"1"), header(kind=b"2"), header(kind=b"6")),
    packed("ant/\udcff\udcfe"),
    packed("a" * 5000),
    packed("../../secret"),
    packed("/etc/passwd"),
    packed("ant/a\x1b[31m\nb"),
    packed("ant/0", DIGITS.encode()),
    packed("ant/0", b"2000000000"),
    packed("ant/0", b"99999999999999999999"),
    packed("ant/0", b"-1"),
    packed("ant/0", b"[" * 100_000, ".json"),
    packed("ant/0", b'{"label": ' + DIGITS.encode() + b"}", ".json"),
    packed("ant/0", b'{"label": true}', ".json"),
    packed("ant/0", more={"size": "99999999999999999999"}),
    packed("ant/0", more={"GNU.sparse.map": "0,10", "GNU.sparse.size": "99999999999"}),
]


# Images.


def picture(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 40), **options: Any) -> Attack:
    return lambda path: Image.new(mode, size).save(path, form, **options)


def postscript(path: Path) -> None:
    """Pillow draws it by Ghostscript."""
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(ran) (w) file closefile\nshowpage\n"
    )


def huge_png(path: Path) -> None:
    """A header for a picture of 10^10 pixels."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    import zlib

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + bytes(20)
        + b"\x00\x00\x00\x00IEND\xaeB`\x82"
    )  # fmt: skip


def huge_jpeg(path: Path) -> None:
    """A sound picture whose header says 65535 x 65535."""
    Image.new("RGB", (40, 40)).save(path, "JPEG")
    content = bytearray(path.read_bytes())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


IMAGES: list[Attack] = [
    postscript,
    huge_png,
    huge_jpeg,
    picture("GIF", "P"),
    picture("ICO"),
    picture("PPM"),
    picture("TIFF", "F"),
    picture("PNG", "RGBA"),
    picture("PNG", "I;16"),
    picture("PNG", "P"),
    picture("JPEG", "CMYK"),
    picture("PNG", size=(1, 1)),
    picture("PNG", size=(1, 4000)),
]
NAMES = [
    b"\xff\xfe.png",
    b"\xe2\x80\xae.png",
    b"-rf.png",
    b"a\nb.png",
    b"\x1b[31m.png",
    b"$(touch ran).png",
    b"a" * 250 + b".png",
]
