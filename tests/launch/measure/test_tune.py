"""Tuning on a GPU: every choice reaches the backend, what is clearly faster is taken, the backend loads the file."""

import pytest
import torch

from evmamba.kernels.tuning import Tuning, load
from evmamba.launch.measure import kernel_bench as bench
from evmamba.launch.measure import tune

triton_es2d = pytest.importorskip("evmamba.kernels.triton_es2d")
triton_norm = pytest.importorskip("evmamba.kernels.triton_norm")
SHAPE = bench.Shape("small", 1, 4, 4, 8, 2)


def rows_of(times):
    """Rows of one shape in which everything takes a millisecond but what `times` names: {(choice, value): ms}."""
    every = [("defaults", None), *((choice, value) for choice, values in tune.CHOICES.items() for value in values)]
    return [
        {"shape": "small", "choice": c, "value": v, "forward_ms": 1.0, "training_ms": times.get((c, v), 1.0)}
        for c, v in every
    ]


def test_every_choice_reaches_the_backend(monkeypatch):
    seen = []

    def forward(*inputs, save, tuning):
        seen.append(("training" if save else "inference", tuning))
        return inputs[0], inputs[0]

    def backward(*inputs, tuning):
        seen.append(("backward", tuning))

    def norm(kind):
        return lambda y, *inputs, tuning: seen.append((kind, tuning))

    monkeypatch.setattr(triton_es2d, "forward", forward)
    monkeypatch.setattr(triton_es2d, "backward", backward)
    monkeypatch.setattr(triton_norm, "forward", norm("norm"))
    monkeypatch.setattr(triton_norm, "backward", norm("norm's backward"))
    monkeypatch.setattr(bench, "measure", lambda call, device, seconds: (call(), bench.Measurement(1, 2, 3, 4))[1])
    rows = tune.tune([SHAPE], torch.device("cpu"))
    assert len(rows) == 1 + sum(len(values) for values in tune.CHOICES.values())
    for name, values in tune.CHOICES.items():
        for value in values:
            for kind in ("inference", "training", "backward", "norm", "norm's backward"):
                assert (kind, Tuning(**{name: value})) in seen


def test_only_what_is_clearly_faster_is_taken_and_loaded(tmp_path):
    rows = rows_of({("few_programs", 500): 0.8, ("backward_registers", 200): 0.99, ("shortest_segment", 128): 1.2})
    path = tune.write(rows, {"device": "NVIDIA Test"}, tmp_path)
    assert load(path) == tune.best(rows) == Tuning(few_programs=500)
    assert "| small | few_programs | 500 | 1.000 | **0.800** |" in (tmp_path / "tuning.md").read_text()


def test_a_value_that_fails_somewhere_is_not_taken():
    rows = rows_of({("backward_registers", 128): 0.5})
    failing = {"shape": "large", "choice": "backward_registers", "value": 128, "error": "OutOfResources: registers"}
    rows += [
        {**row, "shape": "large"} for row in rows_of({}) if row["value"] != 128 or row["choice"] != "backward_registers"
    ]
    assert tune.best([*rows, failing]) == Tuning()


def test_errors_of_the_compiler_are_rows(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def measure(call, device, seconds):
        raise errors.PTXASError("ptxas died\nof something")

    monkeypatch.setattr(bench, "measure", measure)
    rows = tune.tune([SHAPE], torch.device("cpu"))
    assert {row["error"] for row in rows} == {"PTXASError: PTXAS error: ptxas died"}
    assert "PTXAS error: ptxas died" in tune.markdown(rows)
    assert tune.best(rows) == Tuning()
