"""Text files of strangers become plain values or one line."""

import os
import time
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks.plain_files import read_bytes, read_json, read_text, read_yaml


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[NaN]",
        b"[1e999]",
        b'["\\ud800"]',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"9" * 5000 + b"]",
        b"{} {}",
    ],
    ids=["empty", "cut", "no UTF-8", "NaN", "infinite", "half a character", "open", "deep", "objects", "digits", "two"],
)
def test_what_is_no_json_is_one_line_with_the_file(tmp_path: Path, content: bytes):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=f"^{path}: no (valid JSON|UTF-8 text)"):
        read_json(path)


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path: Path):
    assert read_json(write(tmp_path, b'{"a": [1, 2.5, null, "\xc3\xa9"]}')) == {"a": [1, 2.5, None, "é"]}
    assert read_json(write(tmp_path, b"\xef\xbb\xbf[]")) == []


def test_nan_passes_where_the_caller_looks_for_it_and_half_characters_do_not(tmp_path: Path):
    assert read_json(write(tmp_path, b"[Infinity, 1]"), allow_nan=True) == [float("inf"), 1]
    for content in (b'[NaN, "\\ud800"]', b"[NaN", b"[NaN, " + b"[" * 100_000):
        with pytest.raises(UserError, match="no valid JSON"):
            read_json(write(tmp_path, content), allow_nan=True)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", ".", "absent", "a" * 300, "a\0b", "absent/file"):
        with pytest.raises(UserError, match="cannot be read"):
            read_bytes(tmp_path / name)
    with pytest.raises(UserError, match="not a file"):
        read_text(Path("/dev/zero"))


def test_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    begin = time.monotonic()
    with pytest.raises(UserError, match="values with its aliases"):
        read_yaml(write(tmp_path, "\n".join(lines).encode()))
    with pytest.raises(UserError, match="values with its aliases"):
        read_yaml(write(tmp_path, b"a: &a [*a]"))
    assert time.monotonic() - begin < 2


def test_brackets_within_brackets_take_time_in_proportion(tmp_path: Path):
    begin = time.process_time()
    for content in (b"[" * 100_000, b"{" * 100_000, b"[[],{a: " * 50_000):
        with pytest.raises(UserError, match="more than 100 brackets within each other"):
            read_yaml(write(tmp_path, content))
    assert read_yaml(write(tmp_path, b"[" * 100 + b"]" * 100 + b"\n")) is not None
    assert time.process_time() - begin < 2


def test_yaml_is_read_with_few_aliases_and_by_the_loader_that_is_asked_for(tmp_path: Path):
    path = write(tmp_path, b"a: &a {x: 1}\nb: {<<: *a, y: 24:00:00}")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 86400}}
    assert read_yaml(write(tmp_path, b"y: 24:00:00"), as_texts=True) == {"y": "24:00:00"}
    assert read_yaml(write(tmp_path, b"")) is None


@pytest.mark.parametrize(
    "content",
    [b"a: [", b"[" * 5000, b"a: !!python/object/apply:os.getcwd []", b"d: 2024-99-99", b"\x00", b"? [a]\n: b", b"\xff"],
    ids=["cut", "deep", "object", "date", "zero", "list as a key", "no UTF-8"],
)
def test_what_is_no_yaml_is_one_line_with_the_file(tmp_path: Path, content: bytes):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=f"^{path}.*: no (valid YAML|UTF-8 text)"):
        read_yaml(path)
