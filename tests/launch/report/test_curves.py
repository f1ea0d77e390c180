"""Curves from results: sweeps and trainings."""

import pytest

from evmamba.launch.report.curves import POINTS, batch_curves, size_curves, thinned, training_curves
from evmamba.launch.store.results import Result

from ..handmade import made_result, origin


def test_thinning_averages_and_keeps_short_curves_as_they_are():
    short = [(1.0, 2.0), (2.0, 4.0)]
    assert thinned(short) == short
    long = thinned([(float(x), 1.0 + (-1) ** x) for x in range(2 * POINTS)])
    assert len(long) == POINTS
    assert {y for _, y in long} == {1.0}


def test_curves_come_from_the_sweeps_in_the_printed_unit_without_what_failed():
    cost = made_result("cost", "resnet18")
    cost.sweeps = {
        "input_size": [{"input_size": 224, "macs": 2.0}, {"input_size": [3, 448, 448], "macs": 8.0}],
        "batch_size": [
            {"batch_size": 1, "images_per_s": 10.0},
            {"batch_size": 2, "images_per_s": 18.0},
            {"batch_size": 4, "failed": "out of memory"},
        ],
    }
    assert [(c.label, list(c.points)) for c in size_curves([cost], "macs")] == [("resnet18", [(224, 2.0), (448, 8.0)])]
    assert size_curves([cost], "macs", where="another device") == []
    assert [list(curve.points) for curve in batch_curves([cost], "images_per_s")] == [[(1, 10.0), (2, 18.0)]]
    trained = made_result("classification", "resnet18")
    trained.sweeps = {"input_size": [{"input_size": 64, "top1": 0.25}, {"input_size": 96, "top1": 0.5}]}
    assert [list(curve.points) for curve in size_curves([trained], "top1")] == [[(64, 0.25), (96, 0.5)]]
    again = made_result("classification", "resnet18")
    again.sweeps = {"input_size": [{"input_size": 64, "top1": 0.35}, {"input_size": 96, "top1": 0.6}]}
    assert [list(c.points) for c in size_curves([trained, again], "top1")] == [
        [(64, pytest.approx(0.3)), (96, pytest.approx(0.55))]
    ]


def test_precisions_are_curves_of_their_own():
    def cost(precision: str, ms: float):
        result = made_result("cost", "resnet18", provenance=origin() | {"precision": precision})
        result.sweeps = {
            "input_size": [{"input_size": 224 * n, "macs": 5.0 * n, "latency_ms_median": ms * n} for n in (1, 2)]
        }
        return result

    both = [cost("32-true", 1.0), cost("bf16-mixed", 3.0), made_result("cost", "resnet18", provenance={})]
    assert {curve.label: curve.points[0] for curve in size_curves(both, "latency_ms_median")} == {
        "resnet18, float32": (224, 1.0),
        "resnet18, mixed bfloat16": (224, 3.0),
    }
    assert [curve.label for curve in size_curves(both, "macs")] == ["resnet18"]  # counted, not measured


def test_a_training_without_a_curve_has_none():
    assert training_curves([made_result("classification", "resnet18"), Result("r", "cost", "resnet18")]) == []
