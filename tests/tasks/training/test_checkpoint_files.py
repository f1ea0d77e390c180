"""Torn checkpoints are told from whole ones, and one whole file is there whenever a process dies."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evmamba.tasks.training.checkpoint_files import (
    NEEDED,
    RUN_KEY,
    candidates,
    newest_whole,
    read_checkpoint,
    replace_last,
)


def write(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict.fromkeys(NEEDED, 0) | {"state_dict": {"w": torch.arange(4096.0)}, "global_step": step}
    torch.save(content | {RUN_KEY: {"ended": None}}, path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_optimizer(path: Path) -> None:
    content = torch.load(path)
    del content["optimizer_states"]
    torch.save(content, path)


def text(path: Path) -> None:
    path.write_text("no checkpoint")


@pytest.mark.parametrize("tear", [cut, empty, zeros, flip_in_the_middle, without_optimizer, text])
def test_a_torn_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, tear: Callable[[Path], None]):
    previous = write(tmp_path / "checkpoints" / "previous.ckpt", 1)
    last = write(tmp_path / "checkpoints" / "last.ckpt", 2)
    assert newest_whole([last, previous])[0] == read_checkpoint(last)
    tear(last)
    assert read_checkpoint(last) is None
    checkpoint, torn = newest_whole([last, previous])
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step, torn) == (previous, 1, [last])


def test_the_one_of_most_steps_is_tried_first_whatever_the_clocks_of_the_nodes_say(tmp_path: Path):
    for k, name in enumerate(("checkpoints/previous.ckpt", "checkpoints/last.ckpt", "hpc_ckpt_1.ckpt")):
        path = write(tmp_path / name, k)
        os.utime(path, (1000 - k, 1000 - k))
    assert [path.name for path in candidates(tmp_path)] == ["hpc_ckpt_1.ckpt", "last.ckpt", "previous.ckpt"]
    empty(tmp_path / "checkpoints" / "previous.ckpt")  # which may have been the newest
    assert [path.name for path in candidates(tmp_path)] == ["previous.ckpt", "hpc_ckpt_1.ckpt", "last.ckpt"]


def test_killed_between_any_two_renames_a_whole_checkpoint_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "checkpoints"
    write(folder / "previous.ckpt", 1)
    write(folder / "last.ckpt", 2)
    partial = write(folder / ".last.ckpt.partial", 3)
    replace = Path.replace
    done: list[Path] = []

    def dying(self: Path, target: Path) -> Path:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        replace_last(partial, folder)
    checkpoint, _ = newest_whole(candidates(tmp_path))
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.path.name) == (2, "previous.ckpt")
    monkeypatch.undo()
    replace_last(partial, folder)
    checkpoint, _ = newest_whole(candidates(tmp_path))
    assert checkpoint is not None
    assert checkpoint.step == 3


@pytest.mark.parametrize(("first", "then"), [("file", "folder"), ("folder", "file")])
def test_checkpoints_take_turns_also_when_files_give_way_to_folders(tmp_path: Path, first: str, then: str):
    folder = tmp_path / "checkpoints"
    for step, kind in enumerate((first, first, then, then, then)):
        partial = folder / ".last.ckpt.partial"
        write(partial / "meta.pt" if kind == "folder" else partial, step)
        replace_last(partial, folder)
    steps = {path.name: newest_whole([path])[0] for path in candidates(tmp_path)}
    assert {name: found and found.step for name, found in steps.items()} == {"last.ckpt": 4, "previous.ckpt": 3}
