"""The benchmark: the recipe it compares with computes the same function, and its table says what was measured."""

import pytest
import torch

from evmamba.launch.measure import kernel_bench as bench


def test_rows_and_table_of_a_small_shape(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda call, device: (call(), bench.Measurement(1.0, 2.0, 3.0, 4.0))[1])
    shape = bench.Shape("small", 1, 4, 4, 8, 2)
    rows = [bench.run(shape, name, torch.device("cpu"), torch.float32) for name in ("torch", "original", "triton")]
    table = bench.markdown(rows)
    assert "| small | torch | 2.000 |  | 1.0 | 4 | 2.000 |  | 1.0 | 4 |" in table
    assert "EVMAMBA_BACKEND=triton cannot be followed" in rows[2]["error"]
    assert rows[2]["error"] in table


def test_cpu_memory_is_the_peak_of_live_tensors():
    def call():
        first = torch.empty(1_000_000)
        second = torch.empty(2_000_000)
        del first
        return torch.empty(500_000), second

    assert bench.measure(call, torch.device("cpu"), seconds=0.01).memory == 12.0


def test_errors_of_the_compiler_are_rows(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def measure(call, device, seconds=1.0):
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(bench, "measure", measure)
    row = bench.run(bench.Shape("small", 1, 4, 4, 8, 2), "torch", torch.device("cpu"), torch.float32)
    assert row["error"].startswith("OutOfResources: ")
