"""Rank 0 decides how a training begins; what the others think does not count."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evmamba.errors import UserError
from evmamba.tasks.training import agreed_start
from evmamba.tasks.training.agreed_start import Continuation, wait_for_same_view

Views = list[list[tuple[str, int | None]]]


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> Views:
    """What two processes see, one look after the other; this one's own is put in first."""
    told: Views = []

    def gather(found: list, mine: tuple[str, int | None]) -> None:
        found[:] = [mine, *told.pop(0)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(agreed_start, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(agreed_start, "LOOKS", 3)
    return told


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save({"global_step": 5}, path)
    return path


def test_a_node_whose_view_is_behind_for_a_while_is_waited_for(views: Views, last: Path):
    views += [[("n2", None)], [("n2", 3)], [("n2", 5)]]
    wait_for_same_view(last.parents[1], Continuation(last, step=5))
    assert views == []


def test_a_process_that_sees_another_checkpoint_is_named(views: Views, last: Path):
    views += [[("n2", 3)]] * 3
    with pytest.raises(UserError, match=r"rank 0 continues from last\.ckpt, step 5, but rank 1 on n2 finds step 3 in"):
        wait_for_same_view(last.parents[1], Continuation(last, step=5))


def test_what_only_another_process_sees_is_not_begun_anew(views: Views, tmp_path: Path):
    views += [[("n2", 5)]] * 3
    with pytest.raises(UserError, match=r"rank 0 begins anew, but rank 1 on n2 finds step 5 in"):
        wait_for_same_view(tmp_path, Continuation())


def test_what_rank_0_sees_later_than_it_chose_is_not_begun_anew_either(views: Views, last: Path):
    views += [[("n2", None)]] * 3
    with pytest.raises(UserError, match=r"rank 0 begins anew, but rank 0 on .* finds step 5 in"):
        wait_for_same_view(last.parents[1], Continuation())
