"""Tasks of other projects are added without an edit, and never take another one's place unseen."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.tasks import TASKS, Head, Metric, Task, registry
from evmamba.tasks.registry import Registry, import_modules

TOY = Task(
    name="toy",
    module="toy_task.Module",
    data="toy_task.Data",
    heads=(Head("dot", "dot"),),
    metrics=(Metric("score", "score"),),
    recipes="toy_task:recipes",
    backbone_at="network",
)


@pytest.fixture
def tasks() -> Registry:
    return Registry(TASKS.values())


def test_a_registered_task_comes_last_and_may_be_registered_again(tasks: Registry):
    tasks.register(TOY)
    tasks.register(dataclasses.replace(TOY))
    assert list(tasks) == ["classification", "detection", "segmentation", "toy"]
    assert tasks.of_head("dot") is tasks["toy"]


def test_an_unknown_task_is_answered_with_the_nearest(tasks: Registry):
    with pytest.raises(UserError, match="unknown task 'detektion'; did you mean detection"):
        tasks["detektion"]
    with pytest.raises(UserError, match="unknown head 'upernett'; did you mean upernet"):
        tasks.of_head("upernett")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "detection"},
            "there are two tasks 'detection': evmamba.tasks.detection.DetectionModule and toy_task",
        ),
        ({"heads": (Head("upernet", "UPerNet"),)}, "the tasks segmentation and toy both have a head 'upernet'"),
    ],
)
def test_a_task_does_not_take_anothers_name_or_head(tasks: Registry, change: dict, message: str):
    with pytest.raises(UserError, match=message):
        tasks.register(dataclasses.replace(TOY, **change))


def test_only_the_task_that_others_start_from_leaves_its_backbone(tasks: Registry):
    assert [name for name in tasks if tasks.starts_others(name)] == ["classification"]


def test_imported_modules_are_handed_on_to_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "toy_for_import.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv(registry.IMPORTS_VARIABLE, "first_one")
    import_modules(["toy_for_import"])
    assert os.environ[registry.IMPORTS_VARIABLE] == "first_one,toy_for_import"
    with pytest.raises(UserError, match="no module 'nowhere_at_all'"):
        import_modules(["nowhere_at_all"])
