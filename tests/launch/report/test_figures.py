"""Figures and curves: what is drawn is what was measured."""

import re

import pytest

from evmamba.launch.report.curves import Curve
from evmamba.launch.report.figures import Point, _costs, _front, cost_quality_figures, curve_figure, exponent
from evmamba.launch.report.table import build_table

from ..handmade import made_result


def test_the_front_holds_what_no_other_beats_in_both():
    points = [Point("a", 1, 70), Point("b", 2, 65), Point("c", 3, 80), Point("d", 3, 75), Point("e", 4, 80)]
    assert [point.label for point in _front(points)] == ["a", "c"]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_growth_of_a_cost_is_its_power(power: float):
    assert exponent([(x, 3 * x**power) for x in (10, 20, 50)]) == pytest.approx(power)
    assert exponent([(10, 1)]) is None


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
