"""Errors of one process among several, told by the process that has them."""

import pytest

from evmamba.errors import UserError
from evmamba.launch.fit import failures
from evmamba.launch.fit.failures import lost_process, reported_once


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19358. This is ...",
        "[../gloo/transport/tcp/pair.cc:544] Read error [127.0.0.1]:1: Connection reset by peer",
        "recvValue failed on SocketImpl(fd=64): Connection reset by peer",
    ],
)
def test_a_lost_connection_is_one_line_that_points_to_the_other_process(said: str):
    error = lost_process(RuntimeError(said))
    assert str(error).startswith("rank 0 on ")
    assert "\n" not in str(error)
    assert "gloo" not in str(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ConnectionResetError("Connection reset by peer")]
)
def test_other_errors_are_not_taken_for_a_lost_process(error: Exception):
    assert lost_process(error) is None
    with pytest.raises(type(error), match=str(error)), reported_once():
        raise error


def test_a_mistake_that_only_another_rank_has_says_which(monkeypatch: pytest.MonkeyPatch):
    waited: list[float] = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(UserError, match=r"^rank 3 on n7: no such folder$"), reported_once():
        raise UserError("no such folder")
    assert waited == [failures.PATIENCE_SECONDS]  # so that rank 0 can tell it first, if it has it too


def test_rank_0_speaks_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: pytest.fail("rank 0 waits"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^no such folder$"), reported_once():
        raise UserError("no such folder")
