"""Networks after equal wall-clock time."""

from evmamba.launch.report.columns import columns_of
from evmamba.launch.report.equal_time import at_equal_time
from evmamba.launch.report.table import build_table

from ..handmade import made_result

TOP1 = columns_of("classification", "linear")[0]


def trained(model: str, seconds: float, values: list[float]):
    validation = [[10 * (k + 1), {"top1": value}] for k, value in enumerate(values)]
    training = {"seconds": seconds, "steps": 10 * len(values), "validation": validation, "images": 100}
    return made_result("classification", model, run=f"{model}-{seconds}", training=training)


def test_slower_networks_are_read_off_where_the_fastest_ends():
    slow = trained("efficientvmamba_t", 400.0, [0.1, 0.3, 0.5, 0.6])
    fast = trained("resnet18", 200.0, [0.2, 0.25, 0.4, 0.45])
    said = at_equal_time([slow, fast], TOP1)
    assert said is not None
    assert "after 3.3 min of training each, as long as resnet18 takes: resnet18 45.0, EfficientVMamba-T 30.0" in said
    table = build_table([slow, fast])
    assert f"classification: {said}" in table.notes


def test_who_was_not_validated_by_then_is_said_and_one_alone_is_no_comparison():
    results = [
        trained("resnet18", 50.0, [0.2, 0.4]),
        trained("resnet50", 100.0, [0.3, 0.5]),
        trained("efficientvmamba_t", 4000.0, [0.9, 0.9]),
    ]
    said = at_equal_time(results, TOP1)
    assert said is not None
    assert "50 s" in said
    assert said.endswith("EfficientVMamba-T not validated near then (the others' learning rates have not fallen yet)")
    assert at_equal_time(results[:1], TOP1) is None
    assert at_equal_time([made_result("classification", "resnet18"), *results[:1]], TOP1) is None


def test_a_validation_of_long_before_is_not_that_of_then():
    """Of eight epochs the fifth alone is validated: nobody is read off there."""
    slow, fast = trained("efficientvmamba_t", 110.0, [0.5]), trained("resnet18", 100.0, [0.4])
    for result, final in ((slow, 0.58), (fast, 0.48)):
        result.training["steps"] = 16
        result.metrics["top1"] = final
    assert at_equal_time([slow, fast], TOP1) is None
    slow.training["validation"] = [[10, {"top1": 0.5}], [14, {"top1": 0.55}]]
    assert at_equal_time([slow, fast], TOP1) is None  # nor is the one that ended known, if it was tested elsewhere
    fast.data["split"] = "val"
    said = at_equal_time([slow, fast], TOP1)
    assert said is not None
    assert "EfficientVMamba-T 55.0, resnet18 48.0" in said


def test_times_of_trainings_that_had_neighbours_are_not_compared():
    results = [trained("resnet18", 100.0, [0.2, 0.4]), trained("efficientvmamba_t", 200.0, [0.3, 0.5])]
    assert at_equal_time(results, TOP1) is not None
    assert at_equal_time([*results, trained("resnet18", 190.0, [0.2, 0.4])], TOP1) is None
