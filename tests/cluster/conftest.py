"""One cluster for all tests of this folder. They share a pytest-xdist group, so one process runs them, one by one."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, missing_packages


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes, apart from any `make cluster`; the test is skipped where SLURM's packages are absent."""
    if missing := missing_packages():
        pytest.skip(f"no SLURM here: apt-get install {' '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="evmamba-cluster-", dir="/tmp"))  # short, for the socket's path
    folder.chmod(0o711)
    cluster = Cluster(folder)
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)
