"""How far a run is: what it writes, others read; a file that is missing or half written is no progress."""

from pathlib import Path

import pytest

from evmamba.launch.store.progress import PROGRESS_FILE, Progress, last_words, read_progress, write_progress
from evmamba.launch.store.spec import LOG_FILE

from ...full_disk import full_disk


def test_what_a_run_says_is_read_by_others(tmp_path: Path):
    write_progress(tmp_path, "training", 3, 10, 0.5)
    assert read_progress(tmp_path) == Progress("training", 3, 10, 0.5)
    write_progress(tmp_path, "training", checkpoint_seconds=3.5)
    write_progress(tmp_path, "preparing")
    assert read_progress(tmp_path) == Progress("preparing", checkpoint_seconds=3.5)  # until it is measured again
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_FILE]


def test_a_full_disk_does_not_end_a_run_for_its_progress(tmp_path: Path):
    write_progress(tmp_path, "training", 3, 10, 0.5)
    with full_disk(10):
        write_progress(tmp_path, "training", 4, 10, 0.5)
    assert read_progress(tmp_path) == Progress("training", 3, 10, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_FILE]


@pytest.mark.parametrize("text", [None, "", '{"phase": "trai', '{"step": 3}', "[]"])
def test_without_a_readable_file_there_is_no_progress(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / PROGRESS_FILE).write_text(text)
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize(
    ("log", "last"),
    [
        (b"begun\nOutOfMemoryError: 3 GiB\n\n  \n", "OutOfMemoryError: 3 GiB"),
        (b"  \n", "no output"),
        (b"x" * 10_000 + b"\nthe end \xff", "the end \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_the_last_words_are_the_last_line_that_says_something(tmp_path: Path, log: bytes, last: str):
    (tmp_path / LOG_FILE).write_bytes(log)
    assert last_words(tmp_path) == f"{last} (see {tmp_path / LOG_FILE})"


def test_a_run_without_a_log_says_where_it_would_be(tmp_path: Path):
    assert last_words(tmp_path) == f"no log at {tmp_path / LOG_FILE}"
