"""Rank 0 decides how a training begins; what the others think does not count."""

from pathlib import Path

import pytest
import torch.distributed as dist

from evmamba.errors import UserError
from evmamba.tasks.training import agreed_start
from evmamba.tasks.training.agreed_start import wait_for_same_view


def test_a_process_with_another_view_of_the_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    views = [[("n1", 5), ("n2", None)], [("n1", 5), ("n2", 3)], [("n1", 5), ("n2", 5)]]

    def gather(found: list, mine: object) -> None:
        found[:] = views.pop(0)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(agreed_start, "SECONDS_BETWEEN", 0.0)
    wait_for_same_view(tmp_path / "last.ckpt", 5)  # the folder of n2 is behind for a while
    assert views == []
    views = [[("n1", 5), ("n2", 3)]] * 2
    monkeypatch.setattr(agreed_start, "LOOKS", 2)
    with pytest.raises(UserError, match=r"continues from .*last\.ckpt, step 5, but rank 1 on n2 finds step 3 there"):
        wait_for_same_view(tmp_path / "last.ckpt", 5)
