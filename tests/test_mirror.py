"""Tests mirror the folders file by file: `tests/tasks/detection/test_data.py` tests `tasks/detection/data.py`."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT)
    for floor in ("kernels", "evmamba", "tasks", "launch")
    for path in sorted((ROOT / floor).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_has_a_test_of_its_name(file: Path):
    assert (ROOT / "tests" / file.parent / f"test_{file.name}").is_file()


def test_files_of_every_floor_are_seen():
    assert len({file.parts[0] for file in FILES}) == 4
