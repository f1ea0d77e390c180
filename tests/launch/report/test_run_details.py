"""What the page says about single runs: shares, classes and facts are those of the results."""

import pytest

from evmamba.launch.report.run_details import CLASSES_SHOWN, confusion, facts_of, per_class, sentence

from ..handmade import made_result


def test_a_confusions_rows_are_shares_of_all_predictions_also_of_those_not_shown():
    details = {
        "per_class": {"a": {}, "b": {}, "never there": {}},
        "confusion": [[6, 2, 2], [0, 5, 0], [0, 0, 0]],
    }
    shares, names, left_out = confusion(made_result("classification", "resnet18", details=details))
    assert names == ["a", "b"]
    assert shares == [[0.6, 0.2], [0.0, 1.0]]
    assert left_out == 0


def test_classes_come_by_size_over_the_models_with_means_over_seeds():
    def result(model: str, seed: int, first: float):
        values = {f"class {k}": {"accuracy": 0.5, "images": k} for k in range(CLASSES_SHOWN + 5)}
        values["class 44"]["accuracy"] = first
        values["empty"] = {"accuracy": None, "images": 0}
        return made_result("classification", model, run=f"{model}-{seed}", details={"per_class": values})

    table = per_class([result("resnet18", 0, 0.2), result("resnet18", 1, 0.4), result("resnet50", 0, 0.9)])
    assert table["labels"] == ["resnet18", "resnet50"]
    assert table["rows"][0] == ("class 44", ["30.0", "90.0"])
    assert (len(table["rows"]), table["left_out"]) == (CLASSES_SHOWN, 5)


def test_only_the_input_size_reads_like_a_shape():
    text = sentence({"input_size": [3, 224, 224], "input_sizes": [224, 384], "min_size": [480, 800], "none": []})
    assert text == "input size 3x224x224, input sizes 224 384, min size 480 800"


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_run_says_all_that_is_needed_to_repeat_it(task: str):
    facts = facts_of(made_result(task, "resnet18"))
    for name in ("metrics", "data", "commit", "versions", "configuration", "device", "start", "duration"):
        assert facts[name], name
    assert "fingerprint f00d" in facts["data"]
    assert facts["commit"] == "0123456789abcdef"
