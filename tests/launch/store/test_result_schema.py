"""What a report reads of a result file is of the kind that it takes it for."""

import pytest

from evmamba.errors import UserError
from evmamba.launch.store.result_schema import checked


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"metrics": {"top1": "0.8"}}, "metrics"),
        ({"metrics": {"top1": 10**30}}, "metrics"),
        ({"cost": {"parameters": {}}}, "cost"),
        ({"data": []}, "data"),
        ({"data": {"val_images": "many"}}, "val_images"),
        ({"training": {"curve": [[1, 2, 3]]}}, "curve"),
        ({"details": {"per_class": {"cat": 1}}}, "per_class"),
        ({"provenance": {"seed": "0"}}, "seed"),
        ({"provenance": {"config": {"model": "x"}}}, "model"),
        ({"sweeps": {"input_size": [{"input_size": "large"}]}}, "input_size"),
        ({"gallery": "a.jpg"}, "gallery"),
    ],
)
def test_a_part_of_another_kind_is_refused_with_its_name(wrong: dict, where: str):
    with pytest.raises(UserError, match=where):
        checked(wrong)


def test_what_a_task_adds_is_kept_and_texts_become_printable():
    document = {"details": {"mine": [1, {"a": None}]}, "reason": "\x1b[31mred\x1b[0m", "gallery": ["a\udcff.jpg"]}
    assert checked(document) == {
        "details": {"mine": [1, {"a": None}]},
        "reason": "\\x1b[31mred\\x1b[0m",
        "gallery": ["a\\udcff.jpg"],
    }


def test_a_failed_run_and_a_measurement_have_their_spec_for_a_configuration():
    checked({"status": "failed", "provenance": {"config": {"model": "resnet18"}}})
    checked({"task": "cost", "provenance": {"config": {"model": "resnet18"}}})


@pytest.mark.parametrize("wrong", [{"cost": {"macs": "many"}}, {"sweeps": {"batch_size": [{"images_per_s": "x"}]}}])
def test_a_cost_is_a_number_but_for_what_says_its_kind(wrong: dict):
    with pytest.raises(UserError, match="is not a number"):
        checked(wrong)
    checked({"cost": {"macs": 3, "peak_memory_kind": "resident"}, "sweeps": {"x": [{"failed": "no"}]}})
