"""Faster is what is faster in every round, by more than the rounds drift."""

import numpy as np
import pytest

from evmamba.launch.report.table import build_table
from evmamba.launch.report.turns import ahead, drift, first_of

from ..handmade import COST, made_result, origin


def test_what_lies_within_the_drift_is_not_ahead():
    steady, slower = [10.0, 10.1, 10.0, 9.9, 10.0], [10.5, 10.6, 10.4, 10.5, 10.5]
    shaken = [10.1, 12.0, 10.3, 11.5, 10.2]
    assert ahead(steady, slower, "min")
    assert not ahead(slower, steady, "min")
    assert ahead(slower, steady, "max")
    assert not ahead(steady, shaken, "min")  # in every round, but by less than that one drifts
    assert drift(steady) == pytest.approx(0.01)
    assert first_of([slower, steady, shaken], "min") is None
    assert first_of([slower, steady], "min") == 1


def test_equal_networks_are_rarely_ahead_of_all_others():
    random = np.random.default_rng(0)
    found = [first_of(random.normal(10, 0.3, (6, 5)).tolist(), "min") is not None for _ in range(1000)]
    assert np.mean(found) <= 0.05


def timed(model: str, latencies: list[float], turns: str | None = "a") -> object:
    about = {"turns": {"runs": ["x", "y"], "start": turns}} if turns else {}
    return made_result(
        "cost",
        model,
        cost=COST[model] | {"latency_ms_median": latencies[2], "images_per_s": 9.0, "peak_memory_mb": 9.0},
        details={"rounds": {"latency_ms_median": latencies, "images_per_s": [9.0] * 5}},
        provenance=origin() | about,
    )


@pytest.mark.parametrize(
    ("slower", "turns", "marked", "note"),
    [
        ([41.0, 42.0, 41.2, 41.1, 41.3], "a", True, "cost: timed in turns; a number drifted over the rounds by ±1%"),
        ([23.6, 24.9, 23.9, 23.7, 24.0], "a", False, "cost: timed in turns; a number drifted over the rounds by ±3%"),
        ([41.0, 42.0, 41.2, 41.1, 41.3], "b", False, "cost: not all networks were timed in turns with each other"),
        ([41.0, 42.0, 41.2, 41.1, 41.3], None, False, "cost: not all networks were timed in turns with each other"),
    ],
)
def test_a_table_marks_the_faster_where_all_had_turns_together(slower, turns, marked, note):
    table = build_table([timed("resnet18", [23.5, 23.6, 23.5, 23.4, 23.6]), timed("efficientvmamba_t", slower, turns)])
    cells = {row.model: row.cells[0] for row in table.rows if row.kind == "measured"}
    assert cells["resnet18"][2].best is marked
    assert not cells["efficientvmamba_t"][2].best
    assert cells["efficientvmamba_t"][0].best  # parameters are counted
    assert any(line.startswith(note) for line in table.notes)
