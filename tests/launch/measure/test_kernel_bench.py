"""The benchmark: the recipe it compares with computes the same function, and its table says what was measured."""

import pytest
import torch

from evmamba.launch.measure import kernel_bench as bench
from evmamba.launch.measure.original import other_scans

SMALL = bench.Shape("small", 1, 4, 4, 8, 2)
CPU = torch.device("cpu")


def test_rows_and_table_of_a_small_shape(monkeypatch):
    """A backend that cannot run is a row with its error; the others are measured."""

    def at_once(calls, seconds):
        results = []
        for call in calls:
            try:
                call()
                results.append(bench.Measurement(1.0, 2.0, 3.0, 4.0))
            except bench.failures() as error:
                results.append(error)
        return results

    monkeypatch.setattr(bench, "measure_in_turns", at_once)
    monkeypatch.setattr(bench, "floor_ms", lambda shape, device, training: None if training else 0.5)
    rows = bench.run(SMALL, ["torch", "original", "triton"], CPU, torch.float32)
    table = bench.markdown(rows)
    threads = torch.get_num_threads()
    case = f"small, {threads} thread{'s' * (threads > 1)}"
    assert f"| {case} | torch | 2.000 | 4.00 | 1.0 | 4 | 2.000 |  | 1.0 | 4 |" in table
    assert "EVMAMBA_BACKEND=triton cannot be followed" in rows[2]["error"]
    assert rows[2]["error"] in table


def test_calls_take_turns():
    order = []
    bench.measure_in_turns([lambda: order.append("a"), lambda: order.append("b")], seconds=0.0)
    assert order[: 2 * (1 + bench.ROUNDS)] == ["a", "b"] * (1 + bench.ROUNDS)


def test_a_call_that_fails_spoils_no_other():
    def fails():
        raise RuntimeError("no")

    error, measured = bench.measure_in_turns([fails, lambda: None], seconds=0.0)
    assert isinstance(error, RuntimeError)
    assert measured.p20 <= measured.median <= measured.p80


@pytest.mark.parametrize("name", other_scans())
def test_scans_of_other_projects_give_the_same_map(name):
    inputs = bench.make_inputs(bench.Shape("odd", 2, 7, 5, 8, 2), CPU, torch.float32)
    ours, theirs = bench.scan_of("torch")(*inputs), bench.scan_of(name)(*inputs)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_cpu_memory_is_the_peak_of_live_tensors():
    def call():
        first = torch.empty(1_000_000)
        second = torch.empty(2_000_000)
        del first
        return torch.empty(500_000), second

    assert bench.measure(call, torch.device("cpu"), seconds=0.01).memory == 12.0


def test_errors_of_the_compiler_are_rows(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def scan(*inputs):
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(bench, "es2d_scan", scan)
    (row,) = bench.run(SMALL, ["torch"], CPU, torch.float32)
    assert row["error"].startswith("OutOfResources: ")
