"""Records of tasks: light to import, and true about the classes and files that they name."""

import subprocess
import sys
from typing import get_args

import pytest

from evmamba.errors import UserError
from evmamba.tasks import TASKS, Metric, Task
from evmamba.tasks.detection.detectors import DetectorName
from evmamba.tasks.record import load

REFERENCES = ("whole", "predictor", "prediction_writer", "check")


def test_records_are_known_without_the_libraries_that_tasks_need():
    heavy = "{'torch', 'timm', 'lightning'} & {*sys.modules}"
    code = f"import sys; from evmamba.tasks import TASKS; print(len(TASKS), *{heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(len(TASKS))]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_what_a_record_names_is_there(task: Task):
    for path in (task.module, task.data):
        module, _, name = path.rpartition(".")
        assert load(f"{module}:{name}").task == task.name
    assert all(
        callable(getattr(task.load(part), "look", task.load(part))) for part in REFERENCES if getattr(task, part)
    )
    assert task.starts_from is None or task.starts_from in TASKS


def test_the_record_has_the_detectors_that_can_be_built():
    assert {head.key for head in TASKS["detection"].heads} == set(get_args(DetectorName))


def test_a_head_may_have_metrics_of_its_own():
    detection = TASKS["detection"]
    assert detection.metrics_of("retinanet")[0] == Metric("AP", "AP") == detection.metrics_of(None)[0]
    assert detection.metrics_of("maskrcnn")[-1] == Metric("mask_AP75", "mask AP75")
    with pytest.raises(UserError, match="unknown head of detection 'maskrcn'; did you mean maskrcnn"):
        detection.metrics_of("maskrcn")


def test_a_part_that_a_task_lacks_is_named():
    with pytest.raises(UserError, match="the task classification has no whole"):
        TASKS["classification"].load("whole")
