"""Figures and curves: what is drawn is what was measured."""

import re

import pytest

from evmamba.launch.report.curves import POINTS, Curve, batch_curves, size_curves, thinned, training_curves
from evmamba.launch.report.figures import Point, _costs, _front, cost_quality_figures, curve_figure, exponent
from evmamba.launch.report.table import build_table
from evmamba.launch.store.results import Result

from ..handmade import made_result, origin


def test_the_front_holds_what_no_other_beats_in_both():
    points = [Point("a", 1, 70), Point("b", 2, 65), Point("c", 3, 80), Point("d", 3, 75), Point("e", 4, 80)]
    assert [point.label for point in _front(points)] == ["a", "c"]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_growth_of_a_cost_is_its_power(power: float):
    assert exponent([(x, 3 * x**power) for x in (10, 20, 50)]) == pytest.approx(power)
    assert exponent([(10, 1)]) is None


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


def test_a_figure_follows_the_pages_colours_and_names_seeds_once():
    curves = [Curve("T", [(1, 2), (2, 1)]), Curve("T", [(1, 3), (2, 1)]), Curve("<S>", [(1, 1), (2, 2)])]
    svg = curve_figure("loss & more", "steps", "loss", curves)
    assert not re.findall(r"#0[0-9a-f]00ff|#0[1-4]0[1-4]0[1-4]", svg)
    assert "var(--s1)" in svg
    assert "var(--s2)" in svg
    assert "var(--s3)" not in svg
    assert svg.count(">T</text>") == 1
    assert "<S>" not in svg
    assert 'aria-label="loss over steps, loss &amp; more"' in svg


def test_latencies_of_two_devices_are_never_in_one_figure():
    def measured(model: str, device: str, latency: float):
        cost = made_result("cost", model, run=f"{model} on {device}")
        cost.provenance["device"] = device
        cost.cost["latency_ms_median"] = latency
        return cost

    slow = [measured(model, "CPU", 40.0) for model in ("resnet18", "efficientvmamba_t")]
    fast = [measured("resnet18", "A GPU", 2.0)]
    trained = [made_result("classification", model) for model in ("resnet18", "efficientvmamba_t")]
    table = build_table(slow + fast + trained)
    assert _costs(table, "latency_ms_median") == ({"resnet18": 40.0, "efficientvmamba_t": 40.0}, "CPU")
    assert len(_costs(table, "macs")[0]) == 2
    labels = [re.findall('aria-label="([^"]*)"', svg)[0] for svg in cost_quality_figures(table)]
    assert labels[1] == "top-1 (%) over latency of one image (ms), CPU, classification"
