"""The paper as data: complete, consistent with itself, and found under the names that this package builds."""

import pytest
import timm

import evmamba
from evmamba.launch.report.paper import claims, comparable, label_of, paper, published, split_tags
from evmamba.variants import split_name

ROWS = [(table, row) for table in paper()["tables"] for row in table["rows"]]


def test_all_tables_are_there_with_all_their_rows():
    rows = [(table["table"], len(table["rows"])) for table in paper()["tables"]]
    assert rows == [(2, 16), (3, 13), (4, 11), (5, 8), (6, 3), (7, 10), (7, 10), (8, 6)]


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{t['table']}-{r['name']}" for t, r in ROWS])
def test_a_row_has_the_tables_columns_and_plausible_numbers(table: dict, row: dict):
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    assert list(numbers) == [key for key, value in table["rows"][0].items() if isinstance(value, int | float)]
    assert all(0 < value < 100 for key, value in numbers.items() if key not in ("parameters", "macs"))
    if "AP" in numbers:
        assert numbers["AP75"] < numbers["AP50"]
        assert numbers["AP"] < numbers["AP50"]


def test_models_of_the_tables_can_be_built_by_their_names():
    names = {row["model"] for _, row in ROWS if "model" in row}
    for name in names:
        base, _ = split_name(name)
        assert base in evmamba.list_models() or timm.is_model(name), name


def test_the_ablations_agree_with_the_whole_models_numbers():
    for table, row in ROWS:
        if table["table"] in (5, 6, 8) and row.get("model") in ("efficientvmamba_t", "efficientvmamba_b"):
            assert row["top1"] == published(row["model"], "classification", "linear").numbers["top1"]


def test_numbers_are_found_with_their_table():
    row = published("efficientvmamba_b", "detection", "maskrcnn", "3x")
    assert (row.numbers["AP"], row.numbers["mask_AP"], row.table) == (45.0, 40.8, 7)
    assert published("efficientvmamba_b", "detection", "maskrcnn").numbers["AP"] == 43.7  # 1x
    assert published("efficientvmamba_t", "cost", "upernet").numbers == {"parameters": 14, "macs": 230}
    assert published("efficientvmamba_t", "cost", None).numbers == {"parameters": 6, "macs": 0.8}
    assert published("mambaout_tiny", "classification", "linear") is None


def test_where_the_text_contradicts_the_tables_the_number_says_so():
    one = published("efficientvmamba_b", "detection", "maskrcnn", "1x")
    assert "outperforms VMamba-T" in one.explanation
    assert published("vmamba_tiny", "detection", "maskrcnn", "1x").numbers["AP"] - one.numbers["AP"] == pytest.approx(
        2.8
    )
    small = published("efficientvmamba_s", "detection", "maskrcnn", "1x")
    assert "0.5 above ResNet-50" in small.explanation
    above = small.numbers["AP"] - published("resnet50", "detection", "maskrcnn", "1x").numbers["AP"]
    assert above == pytest.approx(1.1)
    assert "learning rate 1e-5" in published("efficientvmamba_t", "detection", "retinanet").explanation


def test_tags_are_a_set():
    one = published("efficientvmamba_t-nofusion-eeee", "classification", "linear")
    assert one == published("efficientvmamba_t-eeee-nofusion", "classification", "linear")
    assert split_tags("resnet18") == ("resnet18", frozenset())
    assert label_of("efficientvmamba_t-ss2d-iiee") == "EfficientVMamba-T · SS2D · IIEE"


def test_data_with_other_counts_is_not_the_papers():
    assert comparable("detection", {"num_classes": 80, "val_images": 5000})
    assert not comparable("detection", {"num_classes": 80, "val_images": 42})
    assert not comparable("classification", {})


def test_claims_name_their_source_and_hardware():
    assert [(c.images_per_s, c.hardware, c.batch_size) for c in claims("efficientvmamba_t")] == [
        (2904, "A100", 128),
        (1396, "V100", None),
    ]
    assert all(claim.source for claim in claims("efficientvmamba_b"))
