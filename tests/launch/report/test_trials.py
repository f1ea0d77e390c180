"""A search in the table: its trials are never taken for results, and what they chose is told."""

from typing import Any

from evmamba.launch.report.table import build_table
from evmamba.launch.report.trials import best_trials
from evmamba.launch.store.results import Result

from ..handmade import DATA, made_result, origin


def tried(model: str, run: str, top1: float | None, lr: float = 1e-3, **told: Any) -> Result:
    optimizer = {"lr": lr, "weight_decay": 0.05}
    config = {"model": {"init_args": {"optimizer": optimizer, "drop_path_rate": 0.1}}}
    data = {"name": "photos", "fingerprint": "f00d"} | DATA["classification"]
    if told.get("trial"):
        data |= {"split": "held out", "test_images": 24}
    state = {"status": "failed", "reason": "no luck"} if top1 is None else {}
    return made_result(
        "classification",
        model,
        run=run,
        data=data,
        metrics={} if top1 is None else {"top1": top1, "top5": 1.0},
        provenance=origin() | {"config": config} | told,
        **state,
    )


def trial(model: str, run: str, top1: float | None, **options: Any) -> Result:
    return tried(model, run, top1, trial=True, **options)


TRIALS = [
    trial("efficientvmamba_t", "a", 0.3),
    trial("efficientvmamba_t", "b", 0.6, lr=4e-3),
    trial("efficientvmamba_t", "c", 0.5),
    trial("resnet18", "d", None),
    trial("resnet18", "e", 0.2),
    trial("resnet18", "f", None),
]


def test_the_best_trial_of_each_network_and_a_failed_one_only_where_none_finished():
    assert [result.run for result in best_trials(TRIALS)] == ["b", "e"]
    assert [result.run for result in best_trials(TRIALS[3:4] + TRIALS[5:])] == ["d"]


def test_trials_alone_are_named_as_such_and_none_counts_as_an_older_run():
    table = build_table(TRIALS)
    assert [group.title for group in table.groups] == ["classification · best trial"]
    assert {row.model: row.cells[0][0].text for row in table.rows if row.kind == "measured"} == {
        "efficientvmamba_t": "60.0",
        "resnet18": "20.0",
    }
    assert "photos (classification 24 test images)" in table.caption  # not those of validation
    assert any("classification · best trial: of each network the trial that did best" in note for note in table.notes)
    assert not any("older" in note for note in table.notes)


def test_what_a_search_chose_stands_below_its_results():
    own = [tried("efficientvmamba_t", "g", 0.62, lr=4e-3, trials=3), tried("resnet18", "h", 0.3, trials=3)]
    same = [tried("efficientvmamba_t", "i", 0.4), tried("resnet18", "j", 0.25)]
    notes = build_table([*TRIALS, *same, *own]).notes
    (line,) = (note for note in notes if "learning rate" in note)
    assert line == (
        "classification · own best of 3 trials: "
        "learning rate 0.004, weight decay 0.05, drop path 0.1: EfficientVMamba-T; "
        "learning rate 0.001, weight decay 0.05, drop path 0.1: resnet18; 1 of 3 trials finished: resnet18"
    )
