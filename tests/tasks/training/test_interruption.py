"""What a training that is stopped asks of SLURM."""

import os
import shlex
from pathlib import Path

import pytest
import torch

from evmamba.tasks.training.interruption import requeue_job


class Requeued(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return int(requeue_job())


def test_loading_processes_which_share_the_signal_do_not_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked, scontrol = tmp_path / "asked", tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(asked))}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    assert [int(batch) for batch in torch.utils.data.DataLoader(Requeued(), num_workers=2)] == [0, 0]
    assert not asked.exists()
    assert requeue_job()
    assert asked.exists()
