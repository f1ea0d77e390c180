"""The steps of a day on a GPU, tried on the CPU with tiny sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from evmamba.launch.measure import gpu_day

SCRIPT = Path(gpu_day.__file__).resolve()


def run_dry(folder, *steps):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, str(SCRIPT), "--output", str(folder), "--dry-run", "--steps", *steps]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_measures_and_does_not_measure_twice(tmp_path):
    steps = ("environment", "smoke", "calibrate", "kernels", "tools", "networks")
    ran = run_dry(tmp_path, *steps)
    assert ran.returncode == 0, ran.stderr
    rows = gpu_day.read(tmp_path)
    assert [row for row in rows if "error" in row] == []
    assert {row["step"] for row in rows} == set(steps)
    by_name = {row["name"]: row for row in rows}
    assert by_name["float32"]["passed"]
    assert by_name["tiny, training"]["us"] > 0
    assert by_name["copy"]["terabytes_a_second"] > 0
    network = next(row for row in rows if row["step"] == "networks")
    assert network["images_a_second"] > 0
    assert "| tiny, training | us " in (tmp_path / "gpu_day.md").read_text()

    assert "none failed" in run_dry(tmp_path, "environment", "calibrate").stdout
    assert gpu_day.read(tmp_path) == rows
