"""Runs of one thing that differ in the seed alone: which they are, and their mean and its interval. When two things
differ is told in `significance`."""

import math
import statistics
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from evmamba.launch.report.significance import half_width
from evmamba.launch.store.results import Result

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
    # Of one seed the newest counts, which is the last to be put in.
    chosen = {_seed(result): result for result in finished if same_recipe(result, finished[-1])}
    failed = {_seed(r): r for r in results if not r.finished and _seed(r) not in {_seed(f) for f in finished}}
    order = lambda result: (_seed(result) is None, _seed(result) or 0)  # noqa: E731
    found = Repetitions(sorted(chosen.values(), key=order), sorted(failed.values(), key=order))
    return found, len(results) - len(found.all)


def _seed(result: Result) -> Any:
    return result.provenance.get("seed")


def same_recipe(one: Result, other: Result) -> bool:
    """Whether two runs differ in nothing but the seed: numbers of two recipes must never be averaged.

    An option that only one of them knows came or went with a version of the code between them: it makes no difference
    where it has its default.
    """
    if one.task == "cost":
        return True  # the group they stand in says size, batch, device and precision
    mine, others = _options(one, "config"), _options(other, "config")
    told = _options(one, "settings") | _options(other, "settings")
    return _budget(one) == _budget(other) and all(
        mine[name] == others[name] if name in mine and name in others else name not in told for name in mine | others
    )


def _budget(result: Result) -> list[Any]:
    origin = result.provenance
    trainer = (origin.get("config") or {}).get("trainer") or {}
    budget = [trainer.get(key) for key in ("max_epochs", "max_steps", "precision")]
    # How processes share a step's images does not change a run; how many they are does.
    steps, images = result.training.get("steps"), images_seen(result)
    weights = str(result.protocol.get("weights", "")).split(" ")[0]  # a checkpoint's path holds the seed
    return [*budget, steps, round(images / steps) if steps and images else None, weights, origin.get("init_family")]


def _options(result: Result, of: Literal["config", "settings"]) -> dict[str, Any]:
    """The options of model and data by their names, without those that say where a run was worked on; all of them
    ("config"), or those that differ from their defaults ("settings"; all where a result does not know that yet)."""
    origin = result.provenance
    config = origin.get(of, origin.get("config")) or {}
    # Where a run starts from another one's weights, their path holds the seed; the other one's family stands for it.
    left_out = WHERE | ({"seed", "checkpoint"} if origin.get("init_from") else {"seed"})
    return dict(_flat({key: config[key] for key in ("model", "data") if key in config}, left_out))


def _flat(mapping: Mapping[str, Any], left_out: Container[str], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if name in left_out:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, left_out, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def images_seen(result: Result) -> int | None:
    """Training images that a run has seen, repetitions counted; None where it does not say."""
    images = result.training.get("images")
    return int(images) if images else None
