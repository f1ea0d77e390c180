"""What stands above and below the table in words: what was run, what is missing and why, what can be told apart."""

from collections.abc import Callable, Sequence
from typing import Any

from evmamba.launch.report.paper import comparable, label_of, paper
from evmamba.launch.report.seeds import images_seen
from evmamba.launch.store.precision import in_words
from evmamba.launch.store.results import Result, code_of, trained_from_scratch
from evmamba.tasks import TASKS

# Numbers of training images that differ by less (relatively) are one budget.
SAME_BUDGET = 0.01


def precision_of(result: Result) -> str:
    """For people: float32, mixed bfloat16 ...; empty where a run does not say."""
    return in_words(str(result.provenance.get("precision", "")))


class Notes:
    """What has to be said below the table, gathered while it is made, so that one line speaks for many cells."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.missing: dict[str, list[str]] = {}
        self.undefined: dict[str, list[str]] = {}

    def lines(self) -> list[str]:
        return [
            *self.failed,
            *(f"{title}: not run for {', '.join(labels)}" for title, labels in self.missing.items()),
            *(f"{what} ({', '.join(labels)})" for what, labels in self.undefined.items()),
        ]


def budgets(title: str, results: list[Result]) -> list[str]:
    """Where runs of one group of columns saw unequal numbers of training images, the comparison is not a fair one. What
    the last, incomplete step of an epoch leaves out makes no difference."""
    models = labels_by(results, images_seen)
    if not models or max(models) <= (1 + SAME_BUDGET) * min(models):
        return []
    seen = (f"{images:,} training images for {', '.join(labels)}" for images, labels in models.items())
    return [f"{title}: unequal budgets, {'; '.join(seen)}"]


def commits(title: str, results: list[Result]) -> list[str]:
    """Where runs of one group of columns are of different code, what changed between may be a difference of theirs. Of
    a training that another run evaluates, that run's code counts."""
    models = labels_by(results, lambda result: code_of(result.provenance))
    if len(models) < 2:
        return []
    by_code = "; ".join(f"{code} {', '.join(labels)}" for code, labels in models.items())
    return [f"{title}: runs of different code, {by_code}"]


def sizes(title: str, results: list[Result]) -> list[str]:
    """Where runs of one group of columns were trained at different sizes, they are not one comparison."""
    option = paper()["trained_at"].get(results[0].task, {}) if results else {}
    lines = []
    for name in option:
        models = labels_by(results, lambda result, name=name: _side(result, name))  # type: ignore[misc]
        if len(models) > 1:
            trained = (f"at {side} pixels {', '.join(labels)}" for side, labels in models.items())
            lines.append(f"{title}: trained at different sizes, {'; '.join(trained)}")
    return lines


def other_trainings(task: str, head: str | None, results: list[Result]) -> list[str]:
    """On the paper's data, runs that were not trained as the published networks, of which they stand above: not as
    long, at another size, not from ImageNet's weights."""
    results = [result for result in results if result.finished and comparable(task, result.data or {})]
    lines = []
    for unit, wanted in paper()["trainings"].get(task, {}).get(head, {}).items():
        models = labels_by(results, lambda result, unit=unit: result.training.get(unit))  # type: ignore[misc]
        lines += [
            f"trained for {int(length):,} {unit}, the published networks for {wanted:,}: {', '.join(labels)}"
            for length, labels in models.items()
            if length != wanted
        ]
    for name, wanted in paper()["trained_at"].get(task, {}).items():
        models = labels_by(results, lambda result, name=name: _side(result, name))  # type: ignore[misc]
        lines += [
            f"trained at {side} pixels, the published networks at {wanted}: {', '.join(labels)}"
            for side, labels in models.items()
            if side != wanted
        ]
    for name, wanted in paper()["set_up"].get(task, {}).items():
        models = labels_by(results, lambda result, name=name: option_of(result, name))  # type: ignore[misc]
        lines += [
            f"{name} {value}, the published networks {wanted}: {', '.join(labels)}"
            for value, labels in models.items()
            if value != wanted
        ]
    if task in TASKS and TASKS[task].starts_from and (scratch := labels_by(results, trained_from_scratch).get(True)):
        lines.append(f"trained from random weights, the published networks from ImageNet's: {', '.join(scratch)}")
    return lines


def labels_by(results: Sequence[Result], value: Callable[[Result], Any]) -> dict[Any, list[str]]:
    """The networks of finished runs by something known of them, in their order."""
    models: dict[Any, list[str]] = {}
    for result in results:
        if result.finished and (found := value(result)) is not None:
            labels = models.setdefault(found, [])
            if label_of(result.model) not in labels:
                labels.append(label_of(result.model))
    return models


def _side(result: Result, name: str) -> int | None:
    """A size that a run was trained at, by its option [pixels]; of several the largest. None for a test alone."""
    if not result.training.get("steps"):
        return None
    value = option_of(result, name)
    if isinstance(value, list | tuple) and value:
        value = max(value)
    return value if isinstance(value, int) else None


def option_of(result: Result, name: str) -> Any:
    """What the data or the model of a run was told by this name; None for nothing."""
    config = result.provenance.get("config") or {}
    for part in (config.get("data"), config.get("model")):
        if (value := ((part or {}).get("init_args") or {}).get(name)) is not None:
            return value
    return None


def memory(results: list[Result]) -> list[str]:
    """What the memory column holds besides the activations; on the CPU not the model."""
    kinds = {result.cost.get("peak_memory_kind", "") for result in results if result.task == "cost"}
    if any("resident" in kind for kind in kinds):
        return ["memory on the CPU: the process's peak above that before the measurement, without the model itself"]
    return []


def _budget(results: list[Result]) -> list[str]:
    """What each run was given: training images, and trials ahead of it."""
    lines = []
    for task in TASKS:
        own = [result for result in results if result.task == task and result.finished]
        seen = {images for result in own if (images := images_seen(result))}
        trials = {count for result in own if (count := result.provenance.get("trials"))}
        parts = [f"{min(seen):,}{f' to {max(seen):,}' if len(seen) > 1 else ''} training images a run"] if seen else []
        parts += [f"own best of {n} trials of as many, on held-out training images" for n in sorted(trials)]
        if parts:
            lines.append(f"{task}: {', '.join(parts)}")
    return lines


def caption(results: list[Result]) -> str:
    """One line: data, budget, device, precision, versions, date."""
    data: dict[str, dict[str, Any]] = {}
    places: dict[str, dict[str, None]] = {}
    software: dict[str, None] = {}
    days: list[str] = []
    for result in results:
        if result.data and (name := result.data.get("name")):
            tested = result.data.get("test_images")
            said = f"{tested} test images" if tested else f"{result.data.get('val_images', '?')} validation images"
            data.setdefault(name, {}).setdefault(result.task, said)
        origin = result.provenance
        if device := origin.get("device"):
            places.setdefault(device, {}).setdefault(precision_of(result))
        if origin.get("versions"):
            names = ("evmamba", "torch")
            software.setdefault(", ".join(f"{n} {origin['versions'][n]}" for n in names if n in origin["versions"]))
        if origin.get("start"):
            days.append(str(origin["start"])[:10])
    when = f"{min(days)} to {max(days)}" if days and min(days) != max(days) else "".join(days[:1])
    sets = [f"{name} ({', '.join(f'{t} {said}' for t, said in tasks.items())})" for name, tasks in data.items()]
    devices = [", ".join(filter(None, [device, *kinds])) for device, kinds in places.items()]
    parts = ["; ".join(sets), "; ".join(_budget(results)), "; ".join(devices), "; ".join(software), when]
    return " | ".join(part for part in parts if part)
