"""Columns: digits that mean something, units, and the names of what is shown."""

import pytest

from evmamba.errors import UserError
from evmamba.launch.report.columns import COST_COLUMNS, columns_of, head_of, title_of
from evmamba.launch.store.results import COST
from evmamba.tasks import TASKS


@pytest.mark.parametrize(
    ("key", "values", "shown"),
    [
        ("parameters", [6_493_660, 126e6], ["6.49", "126.00"]),
        ("macs", [806_436_096, 504.1e9], ["0.81", "504"]),
        ("latency_ms_median", [1.234, 12.34, 123.4], ["1.23", "12.3", "123"]),
        ("peak_memory_mb", [410.0], ["0.40"]),
    ],
)
def test_costs_stand_in_the_headers_unit_with_as_many_digits_as_a_machine_repeats(
    key: str, values: list[float], shown: list[str]
):
    (column,) = [column for column in COST_COLUMNS if column.key == key]
    assert [column.show(value * column.scale) for value in values] == shown


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_columns_are_its_records_metrics(task: str):
    for head in (None, *(head.key for head in TASKS[task].heads)):
        columns, metrics = columns_of(task, head), TASKS[task].metrics_of(head)
        assert [(c.key, c.header, c.better, c.scale) for c in columns] == [
            (m.key, m.header, m.better, m.scale) for m in metrics
        ]
        assert columns[0].show(81.337) == f"{81.337:.{metrics[0].digits}f}"


def test_a_backbones_own_classifier_is_no_head_to_be_named():
    assert title_of("classification", "linear") == "classification"
    assert title_of("detection", "maskrcnn") == "detection · Mask R-CNN"
    assert title_of(COST, None) == COST
    assert title_of(COST, "upernet") == "cost · UPerNet"
    assert head_of(COST, None) is None


def test_an_unknown_task_has_no_columns():
    with pytest.raises(UserError, match="unknown task 'keypoints'"):
        columns_of("keypoints", None)
