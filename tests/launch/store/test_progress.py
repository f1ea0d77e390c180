"""How far a run is: what it writes, others read; a file that is missing or half written is no progress."""

from pathlib import Path

import pytest

from evmamba.launch.store.progress import PROGRESS_FILE, Progress, read_progress, write_progress


def test_what_a_run_says_is_read_by_others(tmp_path: Path):
    write_progress(tmp_path, "training", 3, 10, 0.5)
    assert read_progress(tmp_path) == Progress("training", 3, 10, 0.5)
    write_progress(tmp_path, "preparing")
    assert read_progress(tmp_path) == Progress("preparing")
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_FILE]


@pytest.mark.parametrize("text", [None, "", '{"phase": "trai', '{"step": 3}', "[]"])
def test_without_a_readable_file_there_is_no_progress(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / PROGRESS_FILE).write_text(text)
    assert read_progress(tmp_path) is None
