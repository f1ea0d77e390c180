"""What `fit` decides in a folder with an earlier training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evmamba.errors import UserError
from evmamba.launch.fit.resume import (
    CONFIG_FILE,
    find_continuation,
    move_aside,
    write_config,
)
from evmamba.tasks.training.agreed_start import Continuation
from evmamba.tasks.training.checkpoint_files import NEEDED, RUN_KEY

CONFIG: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 3, "max_steps": -1, "devices": 1, "logger": None, "enable_progress_bar": True},
    "model": {"init_args": {"backbone": "resnet18", "optimizer": {"lr": 0.1}}},
    "data": {"init_args": {"num_workers": 2, "batch_size": 4}},
}


def begun(root: Path, ended: dict[str, int] | None = None) -> Path:
    """A folder with a training at step 5."""
    (root / "checkpoints").mkdir(parents=True)
    content = dict.fromkeys(NEEDED, 0) | {"global_step": 5, RUN_KEY: {"ended": ended}}
    torch.save(content, root / "checkpoints" / "last.ckpt")
    write_config(root, yaml.safe_dump(CONFIG))
    return root / "checkpoints" / "last.ckpt"


def changed(**changes: Any) -> dict[str, Any]:
    """CONFIG with ``part__name`` replaced."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for name, value in changes.items():
        *path, last = name.split("__")
        part = config
        for key in path:
            part = part[key]
        part[last] = value
    return config


def test_an_empty_folder_begins(tmp_path: Path):
    assert find_continuation(tmp_path, CONFIG) == Continuation(None, finished=False)


def test_the_same_training_continues(tmp_path: Path):
    last = begun(tmp_path)
    assert find_continuation(tmp_path, CONFIG | {"ckpt_path": None}) == Continuation(last, step=5)
    free = changed(trainer__devices=8, trainer__logger=False, data__init_args__num_workers=9)
    assert find_continuation(tmp_path, free) == Continuation(last, step=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__init_args__optimizer__lr": 0.2}, r"model\.init_args\.optimizer\.lr was 0\.1, is 0\.2"),
        ({"seed_everything": 1}, "seed_everything was 0, is 1"),
    ],
)
def test_another_training_is_refused_with_what_differs(tmp_path: Path, change: dict[str, Any], message: str):
    begun(tmp_path)
    with pytest.raises(UserError, match=rf"holds a training with other options \({message}\).*--fresh"):
        find_continuation(tmp_path, changed(**change))


def test_more_epochs_and_another_batch_are_told(tmp_path: Path):
    last = begun(tmp_path, ended={"max_epochs": 3, "max_steps": -1})
    with pytest.warns(UserWarning, match=r"batch_size was 4, is 8, trainer\.max_epochs was 3, is 6"):
        assert find_continuation(tmp_path, changed(trainer__max_epochs=6, data__init_args__batch_size=8)) == (
            Continuation(last, step=5)
        )


def test_an_option_of_a_later_version_is_told_and_one_that_was_left_empty_is_refused(tmp_path: Path):
    last = begun(tmp_path)
    later = changed(model__init_args__optimizer__layer_decay=1.0, model__init_args__schedule={"warmup": 0})
    with pytest.warns(UserWarning, match=r"optimizer\.layer_decay is 1\.0 and was no option then, .*schedule\.warmup"):
        assert find_continuation(tmp_path, later) == Continuation(last, step=5)
    before = changed(model__init_args__schedule=None)
    write_config(tmp_path, yaml.safe_dump(before))
    with pytest.raises(UserError, match=r"model\.init_args\.schedule\.warmup was None, is 0"):
        find_continuation(tmp_path, later)


def test_a_finished_training_is_left_alone(tmp_path: Path):
    last = begun(tmp_path, ended={"max_epochs": 3, "max_steps": -1})
    assert find_continuation(tmp_path, CONFIG) == Continuation(last, finished=True, step=5)


def test_a_torn_checkpoint_is_named_and_put_aside(tmp_path: Path):
    last = begun(tmp_path)
    previous = last.with_name("previous.ckpt")
    previous.write_bytes(last.read_bytes())
    last.write_bytes(last.read_bytes()[:300])
    with pytest.warns(UserWarning, match=r"last\.ckpt is torn; continuing from .*previous\.ckpt"):
        assert find_continuation(tmp_path, CONFIG) == Continuation(previous, step=5)
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt.torn", "previous.ckpt"]


def test_without_a_whole_checkpoint_nothing_is_begun_unasked(tmp_path: Path):
    begun(tmp_path).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole \(last\.ckpt\); --fresh begins anew"):
        find_continuation(tmp_path, CONFIG)


def test_fresh_moves_the_earlier_training_aside(tmp_path: Path):
    for number in (1, 2):
        begun(tmp_path)
        (tmp_path / "mine.txt").write_text("not of a training")
        move_aside(tmp_path)
        assert (tmp_path / f"earlier-{number}" / "checkpoints" / "last.ckpt").is_file()
        assert (tmp_path / f"earlier-{number}" / CONFIG_FILE).is_file()
        assert find_continuation(tmp_path, CONFIG) == Continuation()
        assert (tmp_path / "mine.txt").is_file()
