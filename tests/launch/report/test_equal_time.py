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
        trained("resnet50", 80.0, [0.3, 0.5]),
        trained("efficientvmamba_t", 4000.0, [0.9, 0.9]),
    ]
    said = at_equal_time(results, TOP1)
    assert said is not None
    assert "50 s" in said
    assert said.endswith("EfficientVMamba-T not validated yet (the others' learning rates have not fallen yet)")
    assert at_equal_time(results[:1], TOP1) is None
    assert at_equal_time([made_result("classification", "resnet18"), *results[:1]], TOP1) is None
