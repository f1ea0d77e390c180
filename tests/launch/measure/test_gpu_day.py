"""A day on a GPU: rows are kept, failures are rows, no step stops another, nothing has to be installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from evmamba.launch.measure import gpu_day

SCRIPT = Path(gpu_day.__file__).resolve()
# What a bare node may lack.
MISSING = (
    "timm",
    "torchvision",
    "huggingface_hub",
    "safetensors",
    "jsonargparse",
    "lightning",
    "rich",
    "yaml",
    "psutil",
)


def test_only_torch_and_triton_are_needed(tmp_path):
    blocker = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
sys.argv = ["gpu_day.py", "--output", {str(tmp_path)!r}, "--dry-run", "--step", "environment"]
import runpy
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", blocker], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert [row["step"] for row in gpu_day.read(tmp_path)] == ["environment"]


def test_errors_of_the_compiler_are_rows():
    errors = pytest.importorskip("triton.runtime.errors")

    def measure():
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    row = gpu_day.measured("kernels", "T", measure)
    assert row["error"].startswith("OutOfResources: ")
    assert (row["step"], row["name"]) == ("kernels", "T")


def test_a_step_that_dies_or_hangs_stops_no_other(tmp_path, monkeypatch):
    def run(command, timeout, check):
        step = command[command.index("--step") + 1]
        if step == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, {"dies": -11, "runs": 0}[step])

    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    gpu_day.run_all(["dies", "hangs", "runs"], dict.fromkeys(("dies", "hangs", "runs"), 2.0), tmp_path, dry=False)
    assert [(row["step"], row["error"]) for row in gpu_day.read(tmp_path)] == [
        ("dies", "the process ended with -11"),
        ("hangs", "not done after 2.0 minutes"),
    ]


def test_failed_and_torn_rows_are_measured_again(tmp_path):
    for row in ({"name": "a", "us": 1.0}, {"name": "b", "error": "OutOfMemoryError: "}):
        gpu_day.write(tmp_path, {"step": "kernels"} | row)
    with (tmp_path / gpu_day.ROWS).open("a") as file:
        file.write('{"step": "kernels", "name": "c", "us"')
    assert gpu_day.done(tmp_path) == {("kernels", "a")}


def test_without_a_gpu_only_a_dry_run_starts(tmp_path):
    if gpu_day.importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu_day.main(["--output", str(tmp_path)])


def test_rows_are_flushed_line_by_line(tmp_path):
    gpu_day.write(tmp_path, {"step": "smoke", "name": "float32", "passed": True})
    assert json.loads((tmp_path / gpu_day.ROWS).read_text()) == {"step": "smoke", "name": "float32", "passed": True}
