"""Signals outside of a training: what can go on is queued again, what cannot is not."""

import signal
from collections.abc import Iterator

import pytest

from evmamba.launch.fit import signals
from evmamba.launch.fit.signals import ignore_time_limit, requeue_on_signals
from evmamba.tasks.training import slurm_job
from evmamba.tasks.training.interruption import TrainingStopped


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Signals for which SLURM was asked to queue the job again; the handlers of before are put back."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    monkeypatch.setattr(signals, "requeue_job", lambda: asked.append(signal.SIGUSR1))
    yield asked
    for number, handler in before.items():
        signal.signal(number, handler)


def test_warned_outside_of_the_training_a_process_leaves_and_has_the_job_requeued(
    requeued: list[int], capsys: pytest.CaptureFixture[str]
):
    requeue_on_signals()
    with pytest.raises(TrainingStopped) as stopped:
        signal.raise_signal(signal.SIGUSR1)
    assert stopped.value.code == 75
    assert len(requeued) == 1
    assert capsys.readouterr().err == "stopped by SIGUSR1 outside of the training; the same command continues\n"
    with pytest.raises(TrainingStopped):
        signal.raise_signal(signal.SIGTERM)  # of scancel, or of the program that started this one
    assert len(requeued) == 1


def test_an_evaluation_is_requeued_for_preemption_but_not_for_its_time_limit(
    requeued: list[int], monkeypatch: pytest.MonkeyPatch
):
    ignore_time_limit()
    signal.raise_signal(signal.SIGUSR1)
    assert requeued == []
    monkeypatch.setattr(slurm_job, "is_preempted", lambda: True)
    with pytest.raises(TrainingStopped):
        signal.raise_signal(signal.SIGTERM)
    assert len(requeued) == 1
