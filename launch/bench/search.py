"""A small search for every network: the same trials for all, chosen among by training images that are held out.

A recipe made for one network is not equally good for another. Every network gets the recipe itself and the same list of
changes of it (learning rate, weight decay, drop path), trains with each on four fifths of the training images and is
tested on the last fifth; the best trial's settings then train on all of them. Validation images choose nothing.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from evmamba.launch.bench.graph import DROP_PATH_OPTION, HELD_OUT_OPTION, LR_OPTION
from evmamba.launch.fit.recipes import has_drop_path
from evmamba.launch.fit.settings import changed, setting
from evmamba.launch.store.results import FILE_NAME, Result, read_result
from evmamba.launch.store.spec import RUNS_FOLDER, Spec, TrainingSpec
from evmamba.tasks import TASKS

DECAY_OPTION = "model.init_args.optimizer.weight_decay"
HELD_OUT = 0.2
# Of the recipe's learning rate and weight decay; of drop path what it is.
LR_FACTORS = (0.25, 4.0)
DECAY_FACTORS = (0.1, 4.0)
DROP_PATHS = (0.0, 0.1, 0.2)


@dataclass(frozen=True)
class Trial:
    """A change of a recipe: factors of its learning rate and weight decay, and a drop path; None keeps the recipe's."""

    lr: float = 1.0
    weight_decay: float = 1.0
    drop_path: float | None = None

    def applied_to(self, spec: TrainingSpec) -> TrainingSpec:
        """The training with this change."""
        settings = spec.settings
        for option, factor in ((LR_OPTION, self.lr), (DECAY_OPTION, self.weight_decay)):
            if factor != 1:
                settings = changed(settings, option, float(f"{setting(settings, option) * factor:.3g}"))
        if self.drop_path is not None and has_drop_path(spec.model):
            settings = changed(settings, DROP_PATH_OPTION, self.drop_path)
        return structs.replace(spec, settings=settings)


def trials(count: int) -> list[Trial]:
    """The first `count` of one endless list, the same for everybody; the first is the recipe itself."""
    random_numbers = random.Random(0)

    def factor(low: float, high: float) -> float:
        return float(f"{low * (high / low) ** random_numbers.random():.3g}")

    drawn = [
        Trial(factor(*LR_FACTORS), factor(*DECAY_FACTORS), random_numbers.choice(DROP_PATHS)) for _ in range(count - 1)
    ]
    return [Trial(), *drawn]


def searched(specs: Iterable[Spec], count: int, output: Path) -> list[Spec]:
    """A benchmark with its search: the trials alone until all of them have ended, then also what they chose.

    Args:
        specs: the benchmark, see `plan`.
        count: trials of each network, task and head; with the first seed.
        output: the benchmark's folder, where results of trials are.

    Returns:
        Trials, the benchmark, and its trainings by each network's own best settings. Then trials that failed are not
        among them: run again they could make another choice than the one that was trained with.
    """
    specs = list(specs)
    trainings = [spec for spec in specs if isinstance(spec, TrainingSpec)]
    seed = trainings[0].seed if trainings else None
    tried = {
        _key(spec): [_on_held_out(trial.applied_to(spec)) for trial in trials(count)]
        for spec in trainings
        if spec.seed == seed
    }
    everything: list[Spec] = list({trial.name: trial for group in tried.values() for trial in group}.values())
    results = {spec.name: _result(output, spec.name) for spec in everything}
    if any(result is None for result in results.values()):
        return everything
    chosen = {key: _best(group, results) for key, group in tried.items()}
    own = [
        structs.replace(trials(count)[best].applied_to(spec), trials=count)
        for spec in trainings
        if (best := chosen[_key(spec)]) is not None
    ]
    ended = [trial for trial in everything if (result := results[trial.name]) is not None and result.finished]
    return [*ended, *specs, *own]


def _on_held_out(spec: TrainingSpec) -> TrainingSpec:
    return structs.replace(spec, settings=changed(spec.settings, HELD_OUT_OPTION, HELD_OUT), test_scales=())


def _key(spec: TrainingSpec) -> tuple[str, str | None, str, str | None]:
    return spec.task, spec.head, spec.model, spec.recipe


def _best(group: Sequence[TrainingSpec], results: Mapping[str, Result | None]) -> int | None:
    """Which trial is best by its task's first metric, of equal ones the first; None where none has finished."""
    metric = TASKS[group[0].task].metrics_of(group[0].head)[0]
    sign = 1 if metric.better == "max" else -1
    found: dict[int, float] = {}
    for k, spec in enumerate(group):
        result = results[spec.name]
        value = result.metrics.get(metric.key) if result is not None and result.finished else None
        if value is not None:
            found[k] = sign * value
    return max(found, key=lambda k: found[k]) if found else None


def _result(output: Path, name: str) -> Result | None:
    path = output / RUNS_FOLDER / name / FILE_NAME
    return read_result(path) if path.exists() else None
