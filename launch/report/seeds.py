"""Runs of one thing that differ in the seed alone: which they are, and their mean and its interval. When two things
differ is told in `significance`."""

import math
import statistics
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evmamba.launch.report.significance import half_width
from evmamba.launch.store.results import Result, config_hash

# Where and how a run was worked on: its data is known by the fingerprint of the group it stands in.
WHERE = {"data_dir", "num_workers", "staging_dir", "batch_size", "eval_batch_size"}


@dataclass(frozen=True)
class Estimate:
    """A number measured once or several times."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the mean's 95 % interval; None for a single value."""
        return half_width(statistics.stdev(self.values), self.count) if self.count > 1 else None


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """The values that are defined; pycocotools' -1 (no such object) is not."""
    numbers = tuple(value for value in values if value is not None and math.isfinite(value) and value >= 0)
    return Estimate(numbers) if numbers else None


@dataclass
class Repetitions:
    """The runs behind one row of one group: finished ones by seed, failed ones of seeds that never finished."""

    finished: list[Result] = field(default_factory=list)
    failed: list[Result] = field(default_factory=list)

    @property
    def all(self) -> list[Result]:
        return [*self.finished, *self.failed]

    def number(self, key: str, cost: bool = False) -> Estimate | None:
        return estimate((result.cost if cost else result.metrics).get(key) for result in self.finished)


def repetitions(results: Iterable[Result]) -> tuple[Repetitions, int]:
    """Choose, among runs of one model on one task and data set, those of the newest configuration, one a seed.

    Returns:
        The runs that count, and how many older ones were left out.
    """
    results = sorted(results, key=lambda r: str(r.provenance.get("start", "")))
    finished = [result for result in results if result.finished]
    if finished:
        recipe = _recipe(finished[-1])
        # Of one seed the newest counts, which is the last to be put in.
        chosen = {_seed(result): result for result in finished if _recipe(result) == recipe}
    else:
        chosen = {}
    failed = {_seed(r): r for r in results if not r.finished and _seed(r) not in {_seed(f) for f in finished}}
    order = lambda result: (_seed(result) is None, _seed(result) or 0)  # noqa: E731
    found = Repetitions(sorted(chosen.values(), key=order), sorted(failed.values(), key=order))
    return found, len(results) - len(found.all)


def _seed(result: Result) -> Any:
    return result.provenance.get("seed")


def _recipe(result: Result) -> str:
    """What decides a run besides its seed: numbers of two recipes must never be averaged."""
    if result.task == "cost":
        return ""  # the group it stands in says size, batch, device and precision
    origin = result.provenance
    config = origin.get("config") or {}
    trainer = config.get("trainer") or {}
    # Where a run starts from another one's weights, their path holds the seed; the other one's family stands for it.
    left_out = WHERE | ({"seed", "checkpoint"} if origin.get("init_from") else {"seed"})
    decides = {key: _without(config[key], left_out) for key in ("model", "data") if key in config}
    budget = {key: trainer.get(key) for key in ("max_epochs", "max_steps", "precision")}
    # How processes share a step's images does not change a run; how many they are does.
    steps, images = result.training.get("steps"), images_seen(result)
    if steps and images is not None:
        budget["images_per_step"] = round(images / steps)
    weights = str(result.protocol.get("weights", "")).split(" ")[0]  # a checkpoint's path holds the seed
    return config_hash([decides, budget, steps, weights, origin.get("init_family")])


def _without(value: Any, names: Container[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return value


def images_seen(result: Result) -> int | None:
    """Training images that a run has seen, repetitions counted; None where it does not say."""
    images = result.training.get("images")
    return int(images) if images else None
