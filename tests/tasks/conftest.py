"""The real data sets, for the tests of every task, where they are at hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("EVMAMBA_DATA", Path(__file__).parents[3] / "shared" / "data"))
        if not (root / name).is_dir():
            pytest.skip(f"no {name} in {root} (set EVMAMBA_DATA)")
        return root / name

    return find
