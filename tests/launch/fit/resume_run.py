"""Trainings in processes of their own that can be killed; the program that test_train_resume.py starts.

Libraries are imported once, every training is a fork. Reads one JSON object a line from stdin and answers with one:
``{"arguments": [...], "folder": DIR, "ranks": 1, "rows": number or null, "delay": seconds, "signal": "SIGKILL",
"rank": rank that gets the signal or null for all, "group": whether its loading processes get it too, "environment":
{...}}`` is answered by the ranks' exit statuses (negative: the signal that killed it). The signal comes `delay` seconds
after the log has so many rows; rows are written just ahead of a checkpoint. With ``"signal": "SECOND"`` the same
command is started again instead, with its log in ``second/``, and its exit status is the last of the answer.
"""

import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# For the forks: importing takes longer than training here.
import timm  # noqa: F401
import torch
import torch.utils.tensorboard

import evmamba.tasks.classification
import evmamba.tasks.detection
import evmamba.tasks.segmentation  # noqa: F401
from evmamba.launch import cli, train  # noqa: F401


def start(arguments: list[str], folder: Path, ranks: int, environment: dict[str, str]) -> list[int]:
    """Fork the ranks as torchrun would and return their process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= environment
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
                os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            try:
                status = cli.main(arguments)
            except SystemExit as error:
                status = int(error.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        os.setpgid(pid, pid)
        pids.append(pid)
    return pids


def rows(folder: Path) -> int:
    try:
        return (folder / "metrics.csv").read_text().count("\n") - 1
    except FileNotFoundError:
        return 0


def run(job: dict[str, Any]) -> list[int]:
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    due = None
    pids = start(job["arguments"], folder, job["ranks"], job["environment"])
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        if job["rows"] is not None and rows(folder) >= job["rows"]:
            due, job["rows"] = time.monotonic() + job["delay"], None
        if due is not None and time.monotonic() >= due:
            due = None
            if job["signal"] == "SECOND":
                os.kill(pids[0], signal.SIGSTOP)  # lest it is done before the other has begun
                (folder / "second").mkdir()
                pids += start(job["arguments"], folder / "second", 1, job["environment"])
                statuses[pids[-1]] = os.waitstatus_to_exitcode(os.waitpid(pids[-1], 0)[1])
                os.kill(pids[0], signal.SIGCONT)
                continue
            for rank, pid in enumerate(pids):
                if job["rank"] in (None, rank) and pid not in statuses:
                    # The whole group on SIGKILL: loading processes die with a node, too.
                    group = job["group"] or job["signal"] == "SIGKILL"
                    (os.killpg if group else os.kill)(pid, signal.Signals[job["signal"]])
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
