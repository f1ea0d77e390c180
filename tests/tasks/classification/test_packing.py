"""Packing class folders into shards."""

import shutil
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks.classification import packing
from evmamba.tasks.classification.packing import write_shards

pytestmark = pytest.mark.usefixtures("cache")


def test_packing_is_repeatable_and_leaves_nothing_behind_when_it_fails(
    folders: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    again = tmp_path / "again"
    counted: list[float] = []
    write_shards(folders, again, 20_000, 1, lambda done, total: counted.append(done / total))
    assert sum(counted) == pytest.approx(1)
    for file in packed.rglob("*.tar"):
        assert (again / file.relative_to(packed)).read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_shards(folders, again, 20_000, 1)

    real = packing._write
    monkeypatch.setattr(packing, "_write", lambda file, rows, images: real(file, rows[1:], images))
    with pytest.raises(UserError, match=r"the shards do not hold what .*train holds"):
        write_shards(folders, tmp_path / "less", 20_000, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def test_names_that_differ_in_the_suffix_only_cannot_be_packed(folders: Path, tmp_path: Path):
    root = shutil.copytree(folders, tmp_path / "folders")
    shutil.copy(root / "val" / "bee" / "0é.png", root / "val" / "bee" / "0é.jpg")
    with pytest.raises(UserError, match=r"val/bee/0é.jpg and val/bee/0é.png differ in the suffix only"):
        write_shards(root, tmp_path / "out", 20_000, 1)
