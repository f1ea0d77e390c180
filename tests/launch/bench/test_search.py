"""The search: equal trials for all, chosen on held-out training images, then the benchmark with both recipes."""

import datetime
from pathlib import Path

import pytest

from evmamba.errors import UserError
from evmamba.launch.bench.plan import BenchOptions, plan
from evmamba.launch.bench.search import HELD_OUT, Trial, searched, trials
from evmamba.launch.fit.settings import setting
from evmamba.launch.report.table import build_table
from evmamba.launch.store.results import Result, write_result
from evmamba.launch.store.spec import Spec, TrainingSpec, failed_result, origin_of

from ..handmade import made_result, made_spec, origin

SETTINGS = {
    "model": {
        "class_path": "evmamba.tasks.classification.ClassificationModule",
        "init_args": {"optimizer": {"lr": 1e-3}, "drop_path_rate": 0.05},
    },
    "data": {"class_path": "evmamba.tasks.classification.ClassificationData", "init_args": {}},
}
LR, DECAY = "model.init_args.optimizer.lr", "model.init_args.optimizer.weight_decay"
DROP_PATH, SPLIT = "model.init_args.drop_path_rate", "data.init_args.held_out"


def test_trials_are_one_list_for_all_and_begin_with_the_recipe():
    assert trials(1) == [Trial()]
    assert trials(8)[:5] == trials(5)
    assert len(set(trials(16))) == 16
    assert all(0.25 <= trial.lr <= 4 and 0.1 <= trial.weight_decay <= 4 for trial in trials(50))


def ended(spec: Spec, output: Path, top1: float | None) -> None:
    start = datetime.datetime.now(datetime.UTC)
    result = failed_result(spec, "no luck", start) if top1 is None else finished(spec, top1)
    write_result(result, output / "runs" / spec.name)


def finished(spec: Spec, top1: float) -> Result:
    provenance = origin() | origin_of(spec) | {"seed": spec.seed}
    return made_result(spec.task, spec.model, run=spec.name, metrics={"top1": top1, "top5": 1.0}, provenance=provenance)


def benchmark() -> list[Spec]:
    return [
        made_spec("classification", model, seed, settings=SETTINGS)
        for seed in (0, 1)
        for model in ("efficientvmamba_t", "efficientvit_b0")
    ]


def test_trials_come_first_and_each_network_gets_its_own_best(tmp_path: Path):
    base = benchmark()
    first = searched(base, 3, tmp_path)
    assert len(first) == 6
    assert {setting(spec.settings, SPLIT) for spec in first} == {HELD_OUT}
    assert {spec.seed for spec in first} == {0}
    ours, theirs = first[:3], first[3:]
    assert [setting(s.settings, LR) for s in ours] == [setting(s.settings, LR) for s in theirs]
    assert setting(ours[0].settings, LR) == 1e-3
    # A network without stochastic depth keeps what it had.
    assert [setting(s.settings, DROP_PATH) for s in theirs] == [0.05] * 3

    for spec, top1 in zip(first, (0.5, 0.7, 0.6, None, 0.2, None), strict=True):
        assert searched(base, 3, tmp_path) == first  # until the last has ended
        ended(spec, tmp_path, top1)
    whole = searched(base, 3, tmp_path)
    # Not those that failed: run again, they could choose otherwise than has been trained.
    assert whole[:4] == [first[k] for k in (0, 1, 2, 4)]
    assert whole[4:8] == base
    own = whole[8:]
    assert [(spec.model, spec.seed, spec.trials) for spec in own] == [(spec.model, spec.seed, 3) for spec in base]
    assert [setting(spec.settings, LR) for spec in own] == [
        pytest.approx(1e-3 * trials(3)[1].lr, rel=5e-3),
        pytest.approx(1e-3 * trials(3)[1].lr, rel=5e-3),
    ] * 2
    assert {setting(spec.settings, SPLIT) for spec in own} == {0.0}
    assert len({spec.name for spec in whole}) == len(whole)

    trained = [finished(spec, 0.5 + 0.1 * bool(spec.trials)) for spec in whole if spec not in first]
    table = build_table([finished(spec, 0.9) for spec in first] + trained)
    assert [group.title for group in table.groups] == [
        "classification · same recipe",
        "classification · own best of 3 trials",
    ]
    assert {part[0].text for row in table.rows for part in row.cells[:1] if row.kind == "measured"} == {"50.0 (2)"}
    assert "classification: own best of 3 trials of as many, on held-out training images" in table.caption


def test_a_network_none_of_whose_trials_finished_has_no_own_best(tmp_path: Path):
    base = benchmark()[:1]
    for spec in searched(base, 2, tmp_path):
        ended(spec, tmp_path, None)
    assert [spec.trials for spec in searched(base, 2, tmp_path) if isinstance(spec, TrainingSpec)] == [0]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"preset": "paper", "overrides": ["model.init_args.checkpoint=null"]}, "begin with random weights"),
        ({"chained": True}, "detection would start from the trained classification"),
    ],
)
def test_what_would_start_from_other_weights_than_its_trials_is_refused(tmp_path: Path, changes: dict, complaint: str):
    with pytest.raises(UserError, match=complaint):
        plan(BenchOptions(tmp_path, search=2, device="cpu", **changes))
