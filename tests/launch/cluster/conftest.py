"""A cluster for the tests of this folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .slurm_cluster import Cluster, missing_packages


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes; the test is skipped where SLURM's packages are absent.

    Every process of pytest-xdist brings up its own, and none of them meets a `make cluster`.
    """
    if missing := missing_packages():
        pytest.skip(f"no SLURM here: apt-get install {' '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="evmamba-cluster-", dir="/tmp"))  # short, for the socket's path
    folder.chmod(0o711)
    cluster = Cluster(folder)
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)
