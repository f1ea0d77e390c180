"""Shards copied to a node's own disk."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evmamba.errors import UserError
from evmamba.tasks.classification import ClassificationData, staging

from .conftest import SMALL, data

pytestmark = pytest.mark.usefixtures("cache")


def test_staged_shards_give_the_same_and_are_copied_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    module = ClassificationData(str(packed), **SMALL, staging_dir="$NODE_DISK/evmamba")
    module.prepare_data()
    copies = {path: path.stat().st_ino for path in (tmp_path / "disk").rglob("*.tar")}
    assert len(copies) == len(list(packed.rglob("*.tar")))
    module.setup("fit")
    assert {path: path.stat().st_ino for path in (tmp_path / "disk").rglob("*.tar")} == copies
    assert set(module.train_set.images.files) | set(module.val_set.images.files) == set(copies)
    for batch, other in zip(module.val_dataloader(), data(packed).val_dataloader(), strict=True):
        assert batch["path"] == other["path"]
        assert torch.equal(batch["image"], other["image"])


def test_staging_continues_what_was_interrupted_and_renews_what_changed(copied: Path, tmp_path: Path):
    files = sorted(copied.rglob("*.tar"))
    copies = staging.stage(files, str(tmp_path / "disk"))
    os.truncate(copies[0], 10)
    copies[1].unlink()
    copies[1].with_name(f".{copies[1].name}.partial").write_bytes(b"half")
    os.utime(files[2], (1, 1))
    assert staging.stage(files, str(tmp_path / "disk")) == copies
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in files]
    assert not list((tmp_path / "disk").rglob("*.partial"))


def test_staging_that_cannot_work_says_so(folders: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"staging_dir copies tar shards, but .* holds folders"):
        ClassificationData(str(folders), staging_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"\$NO_SUCH_DISK/x names a variable that is not set"):
        data(packed, staging_dir="$NO_SUCH_DISK/x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot stage shards in .*file"):
        data(packed, staging_dir=str(tmp_path / "file"))
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"staging needs 0\.\d GB in .*disk, which has 0\.0 GB free"):
        data(packed, staging_dir=str(tmp_path / "disk"))
