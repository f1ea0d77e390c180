"""What a table says of a search: its trials where nothing else has run yet, and the settings that they chose."""

from collections import Counter
from collections.abc import Sequence

from evmamba.launch.report.columns import columns_of
from evmamba.launch.report.notes import labels_by, option_of
from evmamba.launch.store.results import Result

# Of the optimizer's options, those that a search tries.
TRIED = {"lr": "learning rate", "weight_decay": "weight decay"}
UNFINISHED = (
    "of each network the trial that did best on held-out training images, which is what chooses it and no result. "
    "When all have ended, `evmamba submit --resume` with the same options (or `evmamba bench` again) runs the benchmark"
)


def is_trial(result: Result) -> bool:
    """Whether a run tried settings, tested on held-out training images: no result of a benchmark."""
    return bool(result.provenance.get("trial"))


def best_trials(trials: Sequence[Result]) -> list[Result]:
    """Of each network's trials the best by its task's first metric, or a failed one where none has finished."""
    best: dict[tuple[str, str | None, str], Result] = {}
    for result in trials:
        key = (result.task, result.head, result.model)
        if key not in best or _quality(result) > _quality(best[key]):
            best[key] = result
    return list(best.values())


def _quality(result: Result) -> tuple[bool, float]:
    column = columns_of(result.task, result.head)[0]
    value = result.metrics.get(column.key) if result.finished else None
    return value is not None, (value or 0.0) * (1 if column.better == "max" else -1)


def trial_notes(title: str, results: Sequence[Result], trials: Sequence[Result]) -> list[str]:
    """What a search chose for each network of a group of columns, and for whom not all of its trials finished.

    Args:
        title: the group's.
        results: those behind its cells.
        trials: of all tasks and networks; only finished ones count.
    """
    if any(map(is_trial, results)):
        return [f"{title}: {UNFINISHED}"]
    own = [result for result in results if result.provenance.get("trials")]
    chosen = labels_by(own, _settings)
    finished = Counter((trial.task, trial.head, trial.model) for trial in trials if trial.finished)

    def lacking(result: Result) -> str | None:
        count, wanted = finished[result.task, result.head, result.model], result.provenance["trials"]
        return f"{count} of {wanted} trials finished" if 0 < count < wanted else None

    told = [f"{what}: {', '.join(labels)}" for what, labels in (chosen | labels_by(own, lacking)).items()]
    return [f"{title}: {'; '.join(told)}"] if told else []


def _settings(result: Result) -> str | None:
    """What a run was told of that a search tries, in words; None where it does not say."""
    optimizer = option_of(result, "optimizer") or {}
    parts = [f"{words} {optimizer[name]:.3g}" for name, words in TRIED.items() if optimizer.get(name) is not None]
    if (drop_path := option_of(result, "drop_path_rate")) is not None:
        parts.append(f"drop path {drop_path:.3g}")
    return ", ".join(parts) or None
