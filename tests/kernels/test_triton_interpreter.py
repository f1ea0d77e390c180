"""Runs the Triton tests in Triton's interpreter. It is chosen before triton is imported, hence a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__)
OTHERS = sorted(path for path in HERE.parent.glob("test_*.py") if path != HERE)
FILES = [str(path) for path in OTHERS if "from .triton_runs import" in path.read_text()]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file).stem)
def test_kernels_are_right_in_the_interpreter(file: str):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_the_interpreter_has_files():
    assert len(FILES) > 5
