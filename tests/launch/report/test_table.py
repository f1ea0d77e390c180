"""The table: what stands in which cell, and that nothing missing goes unsaid."""

from pathlib import Path

import pytest

from evmamba.launch.report.build import report_from
from evmamba.launch.report.table import DASH, OTHER_DATA, OTHER_SCHEDULE, build_table

from ..handmade import made_result, origin


def texts(table, row: int, group: int) -> list[str]:
    return [cell.text for cell in table.rows[row].cells[group]]


def test_numbers_stand_in_their_columns_in_the_printed_unit(result_folder: Path):
    table = report_from([result_folder])
    assert [group.title for group in table.groups] == [
        "cost",
        "classification",
        "detection · RetinaNet",
        "segmentation · UPerNet",
    ]
    assert [row.label for row in table.rows] == ["EfficientVMamba-T", "published", "resnet18", "published"]
    assert texts(table, 0, 0) == ["6.49", "0.81", "41.2", "62.3", "0.40", ""]
    assert texts(table, 0, 1) == ["81.3", "99.0"]
    assert texts(table, 0, 2) == ["25.1", "55.0", "20.0", DASH, "31.0", "40.2"]
    assert table.rows[0].cells[1][0].value == pytest.approx(81.337)


def test_a_failed_a_missing_and_an_undefined_cell_each_have_their_line(result_folder: Path):
    table = report_from([result_folder])
    assert texts(table, 2, 2)[0] == "failed"
    assert texts(table, 2, 3) == ["missing"]
    assert "resnet18, detection · RetinaNet: failed: loss is nan at step 3 (a.jpg)" in table.notes
    assert "segmentation · UPerNet: not run for resnet18" in table.notes
    assert "detection · RetinaNet: APs undefined on this data (EfficientVMamba-T)" in table.notes
    measured = [part for row in table.rows if row.kind == "measured" for part in row.cells]
    assert all(cell.text or cell.state == "blank" for part in measured for cell in part)


def test_the_best_of_a_column_is_marked_only_among_several(result_folder: Path):
    table = report_from([result_folder])
    best = [[cell.best for cell in part] for part in table.rows[0].cells]
    assert best[0][0]  # fewer parameters
    assert not best[0][2]  # the slower one
    assert not any(best[1])  # one seed: no verdict
    assert not any(best[2])  # nobody to compare with
    assert not any(cell.best for part in table.rows[1].cells for cell in part)  # published numbers do not compete


def test_published_metrics_on_other_data_say_so_in_their_cell_and_are_not_shown(result_folder: Path):
    table = report_from([result_folder])
    cost, *metrics = table.rows[1].cells
    assert [cell.text for cell in cost[:2]] == ["6", "0.8"]  # parameters and MACs do not depend on data
    assert [[cell.text for cell in part if cell.text] for part in metrics] == [[OTHER_DATA]] * 3
    assert not any(cell.value for part in metrics for cell in part)
    assert "table 2" in metrics[0][0].source
    note = "published metrics are on ImageNet-1K, COCO 2017, ADE20K, not on this table's data, and are left out"
    assert note in table.notes


def test_published_cells_carry_the_difference_and_what_others_report_stays_apart(result_folder: Path):
    cost = report_from([result_folder]).rows[1].cells[0]
    assert [cell.difference for cell in cost[:2]] == ["+0.49", "+0.01"]
    assert cost[-1].text == "2904 A100, 1396 V100"
    assert cost[-1].value is None
    assert "MambaVision" in cost[-1].source
    assert "batch 128" in cost[-1].source


PAPERS_DATA = [
    ("classification", "linear", 1000, 50000, "81.8"),
    ("detection", "retinanet", 80, 5000, "42.8"),
    ("segmentation", "upernet", 150, 2000, "46.5"),
]


@pytest.mark.parametrize(("task", "head", "classes", "images", "number"), PAPERS_DATA)
def test_published_numbers_stand_beside_those_on_the_papers_data_only(
    task: str, head: str, classes: int, images: int, number: str
):
    def published_row(**changes: int) -> list:
        data = {"name": "mine", "fingerprint": "x", "num_classes": classes, "val_images": images} | changes
        table = build_table([made_result(task, "efficientvmamba_b", head=head, data=data)])
        assert any("left out" in note for note in table.notes) == bool(changes)
        return [texts(table, i, 0) for i, row in enumerate(table.rows) if row.kind == "published"]

    assert published_row()[0][0] == number
    assert published_row(val_images=images - 1)[0][0] == OTHER_DATA
    assert published_row(num_classes=classes - 1)[0][0] == OTHER_DATA


def test_throughput_says_its_batch_and_two_batches_share_no_column():
    cost = {"parameters": 1, "macs": 1, "latency_ms_median": 1.0, "images_per_s": 9.0, "peak_memory_mb": 1.0}
    kind = {"peak_memory_kind": "resident memory above the start (VmHWM)"}
    eight = made_result("cost", "resnet18", cost=cost | kind | {"batch_size": 8})
    table = build_table([eight])
    assert [column.header for column in table.groups[0].columns][3] == "img/s (b8)"
    training = {"batch_size": 8, "train_images_per_s": 3.0, "train_batch_size": 4}
    columns = build_table([made_result("cost", "resnet18", cost=cost | kind | training)]).groups[0].columns
    assert [column.header for column in columns][3:5] == ["img/s (b8)", "train img/s (b4)"]
    assert any("without the model itself" in note for note in table.notes)
    on_gpu = made_result(
        "cost", "efficientvmamba_t", cost=cost | {"batch_size": 64, "peak_memory_kind": "CUDA tensors"}
    )
    assert len(build_table([eight, on_gpu]).groups) == 2
    assert not any("without the model" in note for note in build_table([on_gpu]).notes)


def test_two_data_sets_of_one_task_never_share_a_column():
    other = {"name": "clothing", "fingerprint": "b", "num_classes": 10, "val_images": 300}
    table = build_table(
        [made_result("classification", "resnet18"), made_result("classification", "resnet18", data=other)]
    )
    assert [group.title for group in table.groups] == ["classification · clothing", "classification · embedded"]


def test_of_two_runs_of_the_same_thing_the_newer_counts_and_the_other_is_mentioned():
    old = made_result("classification", "resnet18", provenance=origin("2026-01-01T00:00:00+00:00"))
    new = made_result("classification", "resnet18", metrics={"top1": 0.5, "top5": 0.9})
    for order in ([old, new], [new, old]):
        table = build_table(order)
        assert texts(table, 0, 0) == ["50.0", "90.0"]
        assert table.notes == ["1 older run of the same things not shown"]


def test_a_failure_does_not_hide_the_finished_run_before_it():
    finished = made_result("classification", "resnet18", provenance=origin("2026-01-01T00:00:00+00:00"))
    failed = made_result("classification", "resnet18", status="failed", reason="no space", metrics={})
    assert texts(build_table([finished, failed]), 0, 0) == ["81.3", "99.0"]


def test_rows_follow_the_order_asked_for_and_show_who_never_ran():
    results = [made_result("cost", "resnet18"), made_result("cost", "efficientvmamba_t")]
    table = build_table(results, models=["resnet18", "efficientvmamba_s", "efficientvmamba_t"])
    assert [row.model for row in table.rows if row.kind == "measured"] == [
        "resnet18",
        "efficientvmamba_s",
        "efficientvmamba_t",
    ]
    assert "cost: not run for EfficientVMamba-S" in table.notes


def test_mask_rcnn_shows_boxes_and_masks():
    metrics = {f"{kind}{key}": 0.4 for kind in ("", "mask_") for key in ("AP", "AP50", "AP75")}
    table = build_table([made_result("detection", "efficientvmamba_t", head="maskrcnn", metrics=metrics)])
    assert [column.header for column in table.groups[0].columns][::3] == ["box AP", "mask AP"]
    data = {"name": "coco", "fingerprint": "x", "num_classes": 80, "val_images": 5000}
    trained = {"metrics": metrics, "data": data, "training": {"epochs": 12}}
    table = build_table([made_result("detection", "efficientvmamba_t", head="maskrcnn", **trained)])
    assert texts(table, 1, 0) == ["35.6", "57.7", "38.0", "33.2", "54.4", "35.1"]


def test_below_published_numbers_stands_how_the_set_up_differs():
    data = {"name": "coco", "fingerprint": "x", "num_classes": 80, "val_images": 5000}
    provenance = origin() | {"config": {"model": {"init_args": {"rules": "torchvision"}}}}
    table = build_table([made_result("detection", "efficientvmamba_b", data=data, provenance=provenance)])
    note = "detection · RetinaNet: rules torchvision, the published networks mmdetection: EfficientVMamba-B"
    assert note in table.notes
    assert any(line.startswith("detection: the paper's recipes here differ from mmdetection's") for line in table.notes)
    table = build_table([made_result("detection", "efficientvmamba_b")])  # other data
    assert not any("differ from" in line for line in table.notes)


def test_the_papers_schedule_is_chosen_by_the_epochs_that_were_trained():
    metrics = {f"{kind}{key}": 0.4 for kind in ("", "mask_") for key in ("AP", "AP50", "AP75")}
    data = {"name": "coco", "fingerprint": "x", "num_classes": 80, "val_images": 5000}

    def trained(epochs: int | None):
        return made_result(
            "detection", "resnet50", head="maskrcnn", metrics=metrics, data=data, training={"epochs": epochs}
        )

    table = build_table([trained(12), trained(36)])
    assert [group.title for group in table.groups] == ["detection · Mask R-CNN · 1x", "detection · Mask R-CNN · 3x"]
    assert [texts(table, 1, g)[0] for g in (0, 1)] == ["38.2", "41.0"]
    assert [table.rows[1].cells[g][0].difference for g in (0, 1)] == ["+1.8", "\N{MINUS SIGN}1.0"]
    for epochs in (24, None):  # neither schedule, or a checkpoint tested by hand
        assert texts(build_table([trained(epochs)]), 1, 0)[:2] == [OTHER_SCHEDULE, ""]


def test_runs_of_one_name_on_two_machines_are_told_apart(tmp_path: Path):
    results = [made_result("cost", "resnet18", run="cost-resnet18-abc") for _ in range(2)]
    for n, result in enumerate(results):
        result.provenance["device"] = f"machine {n}"
        result.folder = tmp_path / str(n)
    table = build_table(results)
    behind = [part[0].runs for part in table.rows[0].cells]
    assert behind == [[f"cost-resnet18-abc in {tmp_path / str(n)}"] for n in range(2)]
    assert [run.run for run in table.results] == [names[0] for names in behind]


def test_ablated_networks_have_a_table_of_their_own_beside_the_whole_one():
    data = {"name": "imagenet", "fingerprint": "x", "num_classes": 1000, "val_images": 50000}
    names = ["efficientvmamba_t", "efficientvmamba_t-ss2d", "efficientvmamba_t-eeee", "resnet18"]
    table = build_table([made_result("classification", name, data=data) for name in names])
    assert [row.model for row in table.rows if row.kind == "measured"] == ["efficientvmamba_t", "resnet18"]
    assert table.ablations is not None
    labels = {row.label for row in table.ablations.rows if row.kind == "measured"}
    assert labels == {"EfficientVMamba-T", "EfficientVMamba-T · SS2D", "EfficientVMamba-T · EEEE"}
    eeee = next(row for row in table.ablations.rows if row.kind == "published" and row.model.endswith("eeee"))
    assert eeee.cells[0][0].text == "75.1"  # table 5


def test_costs_at_two_sizes_share_no_column_and_whole_models_show_what_was_counted():
    whole = made_result(
        "cost", "efficientvmamba_t", head="maskrcnn", cost={"parameters": 26e6, "macs": 188e9, "batch_size": 1}
    )
    whole.protocol["input_size"] = [3, 800, 1280]
    table = build_table([made_result("cost", "efficientvmamba_t"), whole])
    assert [group.title for group in table.groups] == ["cost", "cost · Mask R-CNN at 1280 x 800"]
    assert [column.key for column in table.groups[1].columns] == ["parameters", "macs"]
    assert texts(table, 1, 1) == ["11", "60"]  # table 7


def test_a_suites_order_of_models_holds_in_both_tables_and_misses_no_ablated_one():
    names = ["efficientvmamba_t", "efficientvmamba_t-ss2d", "efficientvmamba_t-eeee"]
    table = build_table([made_result("classification", name) for name in reversed(names)], models=names)
    assert [row.model for row in table.rows if row.kind == "measured"] == names[:1]
    assert table.ablations is not None
    assert [row.model for row in table.ablations.rows if row.kind == "measured"] == names
    assert not [note for note in [*table.notes, *table.ablations.notes] if "not run" in note]


def test_groups_of_one_kind_have_titles_of_their_own():
    def cost(precision: str, device: str = "CPU", batch: int = 4):
        result = made_result("cost", "resnet18", provenance=origin() | {"precision": precision, "device": device})
        result.cost |= {"batch_size": batch}
        return result

    def titles(*results):
        return [group.title for group in build_table(results).groups]

    assert titles(cost("32-true")) == ["cost"]
    assert titles(cost("32-true"), cost("bf16-mixed")) == ["cost · float32", "cost · mixed bfloat16"]
    assert titles(cost("32-true"), cost("32-true", "GPU")) == ["cost · CPU", "cost · GPU"]
    several = titles(cost("32-true"), cost("bf16-mixed", "GPU"), cost("32-true", "GPU"), cost("32-true", "GPU", 8))
    assert len(set(several)) == 4
    assert "cost · GPU · float32 · batch 8" in several
    data = {"name": "mine", "num_classes": 3, "val_images": 5}
    same_name = [made_result("classification", "resnet18", data=data | {"fingerprint": f}) for f in ("aaaa", "bbbb")]
    assert titles(*same_name) == ["classification · data aaaa", "classification · data bbbb"]
