"""Checkpoints that are folders: whole or not at all."""

from pathlib import Path

import pytest
import torch

from evmamba.launch.fit.checkpoint_folders import folder_kind, replaced_folder, restore_previous


def fsdp2_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(b"")
    torch.save({}, folder / "meta.pt")
    return folder


class OneProcess:
    is_global_zero = True

    def barrier(self) -> None:
        pass

    def broadcast(self, told: str) -> str:
        return told


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "best.ckpt"
    for text in ("first", "second"):
        with replaced_folder(target, OneProcess()) as partial:  # type: ignore[arg-type]
            partial.mkdir()
            (partial / "weights").write_text(text)
            assert not target.exists() or (target / "weights").read_text() == "first"
        assert (target / "weights").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]


def test_writing_that_failed_leaves_the_checkpoint_before_it(tmp_path: Path):
    target = fsdp2_folder(tmp_path / "best.ckpt")

    def fail() -> None:
        with replaced_folder(target, OneProcess()) as partial:  # type: ignore[arg-type]
            partial.mkdir()
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert folder_kind(target) == "fsdp2"


def test_a_checkpoint_between_two_renames_is_put_back(tmp_path: Path):
    target = tmp_path / "best.ckpt"
    fsdp2_folder(tmp_path / ".best.ckpt.previous")
    restore_previous(target)
    assert folder_kind(target) == "fsdp2"
    restore_previous(tmp_path / "nothing.ckpt")
    assert not (tmp_path / "nothing.ckpt").exists()
