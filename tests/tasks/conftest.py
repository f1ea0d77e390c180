"""Data sets for the tests of every task: real ones where they are at hand, and small sound ones to damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .damage import WRITERS
from .golden import golden_file


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("EVMAMBA_DATA", Path(__file__).parents[3] / "shared" / "data"))
        if not (root / name).is_dir():
            pytest.skip(f"no {name} in {root} (set EVMAMBA_DATA)")
        return root / name

    return find


@pytest.fixture(scope="session")
def golden_heads() -> Callable[[str], dict[str, torch.Tensor]]:
    """Arrays of a golden file made by mmdetection's or mmsegmentation's code, as tensors, inputs widened to float64.

    Others of the same kind and other sizes are read from the folder `EVMAMBA_GOLDEN_HEADS`, which need not have all.
    """

    def read(name: str) -> dict[str, torch.Tensor]:
        with np.load(golden_file(f"{name}.npz")) as arrays:
            # Names of parameters are the only text.
            content = {key: torch.from_numpy(arrays[key]) for key in arrays if arrays[key].dtype.kind != "U"}
        return {key: value.double() if value.dtype == torch.float32 else value for key, value in content.items()}

    return read


@pytest.fixture(scope="session")
def golden_sizes() -> Callable[[str], dict[str, Any]]:
    """A golden JSON file of the same folder."""
    return lambda name: json.loads(golden_file(f"{name}.json").read_text())


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small sound data set of every task."""
    root = tmp_path_factory.mktemp("data")
    for task, write in WRITERS.items():
        write(root / task, train=20, val=10)
    return root


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A data set to damage."""
    return lambda task: shutil.copytree(sound / task, tmp_path / task)
