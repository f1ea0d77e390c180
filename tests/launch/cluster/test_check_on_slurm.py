"""`evmamba cluster check` on two nodes: every thing is tried, and the job comes back after its request."""

import io
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from evmamba.launch.cluster.check import JOB_FILE, check, read_answers
from evmamba.launch.cluster.settings import read_cluster

from ..tiny import free_port
from .slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_two_nodes_are_tried_and_the_settings_that_fit_are_told(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment()[name])
    meet = f"export GLOO_SOCKET_IFNAME=lo MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()} OMP_NUM_THREADS=1"
    settings = read_cluster(None, {"gpus_per_node": ["0"], "environment": [meet]})
    said = io.StringIO()
    folder = tmp_path / "check"

    def warn() -> None:
        """Send SLURM's signal as soon as there is nothing else to wait for, lest this test take two minutes."""
        while not (folder / JOB_FILE).is_file() or sum(bool(a.meetings) for a in read_answers(folder)) < 2:
            time.sleep(0.3)
        cluster.run("scancel", "--signal=USR1", (folder / JOB_FILE).read_text())

    threading.Thread(target=warn, daemon=True).start()
    good = check(settings, folder, Console(file=said, width=200))
    text = said.getvalue()
    assert good, text + (folder / "run.log").read_text()
    first, second = read_answers(folder)
    assert (first.node, second.node) == ("n1", "n2")
    assert (first.processes, first.nodes) == (2, 2)
    assert second.locked is True
    assert [meeting.error for meeting in first.meetings] == [""]
    assert first.signal_s is not None
    assert first.requeue is True
    assert "works, by the run itself" in text
    assert "cpus_per_task: 8" in text
    assert "chain" not in text.partition("# settings that fit")[2]
