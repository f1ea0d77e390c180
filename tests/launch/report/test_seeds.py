"""Repetitions: which runs are one cell, their mean and interval, and when two models can be told apart."""

from pathlib import Path

import pytest

from evmamba.launch.report.seeds import Estimate, estimate, repetitions
from evmamba.launch.report.table import build_table
from evmamba.launch.store.spec import TrainingSpec, origin_of

from ..handmade import made_result, made_spec, origin


def seeded(model: str, seed: int, top1: float, day: int = 1, epochs: int = 3, **changes):
    config = {
        "model": {"init_args": {"backbone": model}},
        "data": {"init_args": {"seed": seed}},
        "trainer": {"max_epochs": epochs},
    }
    provenance = origin(f"2026-03-{day:02d}T00:00:00+00:00") | {"seed": seed, "config": config}
    metrics = {"top1": top1, "top5": 0.9}
    run = f"{model}-{seed}-{epochs}-{day}"
    return made_result("classification", model, run=run, metrics=metrics, provenance=provenance, **changes)


def test_runs_that_differ_in_the_seed_alone_are_one_cell_with_mean_interval_and_number():
    table = build_table([seeded("resnet18", seed, top1) for seed, top1 in enumerate((0.80, 0.81, 0.82))])
    cell = table.rows[0].cells[0][0]
    assert cell.text == "81.0 ± 2.5 (3)"
    # Student's t for two degrees of freedom is 4.303; the standard deviation is 1.
    assert (cell.value, cell.half_width, cell.count) == (pytest.approx(81), pytest.approx(4.303 / 3**0.5, abs=1e-3), 3)
    assert cell.runs == ["resnet18-0-3-1", "resnet18-1-3-1", "resnet18-2-3-1"]
    assert not any("older" in note for note in table.notes)


def test_seeds_that_agree_show_that_they_are_several_and_no_interval_of_zero():
    table = build_table([seeded("resnet18", seed, 0.8) for seed in (0, 1)])
    assert table.rows[0].cells[0][0].text == "80.0 (2)"
    table = build_table([seeded("resnet18", seed, 0.8 + 1e-5 * seed) for seed in (0, 1, 2)])
    assert table.rows[0].cells[0][0].text == "80.0 ± <0.1 (3)"


def test_the_same_seed_twice_is_not_a_repetition():
    runs, older = repetitions([seeded("resnet18", 0, 0.5, day=1), seeded("resnet18", 0, 0.6, day=2)])
    assert [result.metrics["top1"] for result in runs.finished] == [0.6]
    assert older == 1


def test_where_a_run_worked_and_how_its_step_was_shared_is_no_other_recipe():
    results = []
    for seed, (path, batch) in enumerate([("/a", 256), ("/b", 512)]):
        result = seeded("resnet18", seed, 0.5 + seed / 10, training={"steps": 10, "images": 20480})
        result.provenance["config"]["data"]["init_args"] |= {"data_dir": path, "num_workers": seed, "batch_size": batch}
        results.append(result)
    assert build_table(results).rows[0].cells[0][0].text == "55.0 ± 63.5 (2)"
    results[1].training["images"] = 40960  # now twice the images a step
    assert build_table(results).rows[0].cells[0][0].count == 1


def test_two_recipes_are_never_averaged():
    results = [seeded("resnet18", 0, 0.5, day=1), seeded("resnet18", 1, 0.9, day=2, epochs=30)]
    runs, older = repetitions(results)
    assert [result.metrics["top1"] for result in runs.finished] == [0.9]
    assert older == 1


def test_seeds_that_start_from_their_own_classifiers_are_repetitions_unless_those_had_other_recipes():
    def spec(seed: int, steps: int) -> TrainingSpec:
        classifier = made_spec("classification", seed=seed, settings={"trainer": {"max_steps": steps}})
        return made_spec("detection", seed=seed).after(classifier)

    def result(seed: int, steps: int):
        of = spec(seed, steps)
        changed = seeded("resnet18", seed, 0.5 + seed / 10, day=seed + 1)
        changed.provenance |= origin_of(of)
        path = str(of.start.folder(Path("runs/detection")) / "backbone.safetensors")
        changed.provenance["config"]["model"]["init_args"]["checkpoint"] = path
        return changed

    assert spec(0, 1).start.folder(Path()) != spec(1, 1).start.folder(Path())
    runs, older = repetitions([result(0, 1), result(1, 1)])
    assert [len(runs.finished), older] == [2, 0]
    runs, older = repetitions([result(0, 1), result(1, 2)])
    assert [len(runs.finished), older] == [1, 1]


@pytest.mark.parametrize("newer", [0, 1], ids=["came", "went"])
def test_an_option_that_came_or_went_at_its_default_makes_no_other_recipe(newer: int):
    def results(told: dict) -> list:
        without, having = (seeded("resnet18", seed, 0.5, day=1 + (seed != newer)) for seed in (0, 1))
        for result in (without, having):
            result.provenance["settings"] = {"model": {"init_args": {"backbone": "resnet18"}}}
        having.provenance["config"]["model"]["init_args"]["optimizer"] = {"nesterov": bool(told)}
        having.provenance["settings"]["model"]["init_args"] |= told
        return [without, having]

    assert len(repetitions(results({}))[0].finished) == 2
    assert len(repetitions(results({"optimizer": {"nesterov": True}}))[0].finished) == 1


def test_a_default_that_changed_makes_another_recipe():
    before, after = (seeded("resnet18", seed, 0.5, day=1 + seed) for seed in (0, 1))
    for result, lr in ((before, 1e-3), (after, 2e-3)):
        result.provenance["config"]["model"]["init_args"]["lr"] = lr
        result.provenance["settings"] = {"model": {"init_args": {"backbone": "resnet18"}}}
    assert len(repetitions([before, after])[0].finished) == 1


def test_an_option_of_a_result_that_does_not_know_its_defaults_counts():
    before, after = (seeded("resnet18", seed, 0.5, day=1 + seed) for seed in (0, 1))
    after.provenance["config"]["model"]["init_args"]["lr"] = 1e-3
    assert len(repetitions([before, after])[0].finished) == 1


def test_a_seed_that_failed_is_said_and_not_counted():
    failed = seeded("resnet18", 2, 0.0, status="failed", reason="no space")
    table = build_table([seeded("resnet18", 0, 0.8), seeded("resnet18", 1, 0.8), failed])
    assert table.rows[0].cells[0][0].count == 2
    assert "resnet18, classification (seed 2): failed: no space" in table.notes


def test_who_cannot_be_told_from_the_highest_mean_is_said_with_the_rule():
    close = [seeded("resnet18", seed, 0.80 + 0.01 * seed) for seed in range(3)]
    best = [seeded("resnet50", seed, 0.82 + 0.01 * seed) for seed in range(3)]
    far = [seeded("resnet34", seed, 0.30 + 0.01 * seed) for seed in range(3)]
    table = build_table(close + best + far)
    cells = {row.model: row.cells[0][0] for row in table.rows if row.kind == "measured"}
    assert [cells[name].tied for name in ("resnet50", "resnet18", "resnet34")] == [True, True, False]
    assert not any(cell.best for cell in cells.values())
    assert "classification: not told apart from resnet50, the highest mean: resnet18" in table.notes
    assert (cells["resnet18"].like, cells["resnet34"].like) == (["resnet50"], [])
    assert any("Welch" in note and "Holm" in note for note in table.notes)


def test_two_that_cannot_be_told_apart_are_said_once():
    ours = [seeded("efficientvmamba_t", seed, 0.80 + 0.01 * seed) for seed in range(3)]
    best = [seeded("resnet18", seed, 0.81 + 0.01 * seed) for seed in range(3)]
    notes = [note for note in build_table(ours + best).notes if "not told apart" in note]
    assert notes == ["classification: not told apart from resnet18, the highest mean: EfficientVMamba-T"]


def test_only_what_is_better_than_all_others_is_the_best():
    best = [seeded("resnet50", seed, 0.90 + 0.001 * seed) for seed in range(3)]
    far = [seeded(name, seed, 0.30 + 0.01 * seed) for name in ("resnet18", "resnet34") for seed in range(3)]
    cells = {row.model: row.cells[0][0] for row in build_table(best + far).rows if row.kind == "measured"}
    assert [cells[name].best for name in ("resnet50", "resnet18", "resnet34")] == [True, False, False]
    assert not any(cell.tied for cell in cells.values())


def test_who_ties_with_our_networks_is_said_too():
    ours = [seeded("efficientvmamba_t", seed, 0.70 + 0.01 * seed) for seed in range(3)]
    like = [seeded("resnet18", seed, 0.705 + 0.01 * seed) for seed in range(3)]
    best = [seeded("resnet50", seed, 0.90 + 0.001 * seed) for seed in range(3)]
    notes = build_table(ours + like + best).notes
    assert "classification: not told apart from EfficientVMamba-T: resnet18" in notes
    assert not any("highest mean" in note for note in notes)


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_get_no_verdict_and_no_mark(seeds):
    best = [seeded("resnet50", seed, 0.90 + 0.001 * seed) for seed in range(seeds)]
    table = build_table([seeded("resnet18", seed, 0.80 + 0.001 * seed) for seed in range(seeds)] + best)
    assert not any(row.cells[0][0].tied or row.cells[0][0].best for row in table.rows)
    assert "classification: no verdict below 3 seeds: resnet18, resnet50" in table.notes


def test_what_is_undefined_does_not_enter_a_mean():
    assert estimate([0.2, None, -1.0, float("nan"), 0.4]) == Estimate((0.2, 0.4))
    assert estimate([None, -1.0]) is None


def test_unequal_numbers_of_training_images_are_said():
    results = [
        seeded("resnet18", 0, 0.8, training={"images": 1000}),
        seeded("resnet50", 0, 0.8, training={"images": 2000}),
    ]
    notes = build_table(results).notes
    assert any("1,000 training images for resnet18; 2,000 training images for resnet50" in note for note in notes)
    results[1].training["images"] = 1000
    assert not any("unequal" in note for note in build_table(results).notes)
