"""The published numbers of `paper.yaml`: names that people read, rows of the paper's tables, others' claims."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evmamba.tasks import TASKS

# What the tags of an ablated network's name mean (`evmamba.variants.TAGS`), for people.
TAGS = {"ss2d": "SS2D", "nofusion": "without fusion", "step1": "step 1", "step4": "step 4"}


@dataclass(frozen=True)
class Published:
    """One row of one of the paper's tables: `numbers` in the printed units, under this package's names; `notes` say
    where the paper contradicts itself."""

    numbers: Mapping[str, float]
    table: int
    name: str
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        return f"{paper()['source']}, table {self.table}, row {self.name}"

    @property
    def explanation(self) -> str:
        """The source with all that has to be said of the number."""
        return ". ".join([self.source, *(note[0].upper() + note[1:] for note in self.notes)])


@dataclass(frozen=True)
class Claim:
    """Somebody else's throughput of a model [images/s], with where it was measured."""

    images_per_s: float
    hardware: str
    batch_size: int | None
    source: str


@functools.cache
def paper() -> dict[str, Any]:
    """The whole file."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))


# The paper's own networks.
OURS: tuple[str, ...] = tuple(row["model"] for row in paper()["variants"]["rows"])


def split_tags(model: str) -> tuple[str, frozenset[str]]:
    """A network's name without, and the set of, the tags of its ablation: ``"efficientvmamba_t-ss2d"``."""
    base, *tags = model.split("-")
    return (base, frozenset(tags)) if base in paper()["labels"] else (model, frozenset())


def label_of(model: str) -> str:
    """The name that people read: EfficientVMamba-T · SS2D, or the model's own name."""
    base, *tags = model.split("-") if split_tags(model)[1] else [model]
    return " · ".join([paper()["labels"].get(base, base), *(TAGS.get(tag, tag.upper()) for tag in tags)])


def published(model: str, task: str, head: str | None, schedule: str | None = None) -> Published | None:
    """The paper's row for a model with a head; task ``"cost"`` gives its parameters and MACs.

    Args:
        schedule: ``"1x"`` or ``"3x"``, where the paper has both; None takes the first.
    """
    cost = task == "cost"
    if cost:
        bare = paper()["backbones"]
        task, head = (bare["task"], bare["head"]) if head is None else (TASKS.of_head(head).name, head)
    for table in paper()["tables"]:
        if (table["task"], table["head"]) != (task, head) or schedule not in (None, table.get("schedule")):
            continue
        for row in table["rows"]:
            if "model" in row and split_tags(row["model"]) == split_tags(model):
                numbers = {
                    key: value
                    for key, value in row.items()
                    if isinstance(value, int | float) and (key in ("parameters", "macs")) == cost
                }
                notes = tuple(place["note"] for place in (row, table) if "note" in place)
                return Published(numbers, table["table"], row["name"], notes)
    return None


def comparable(task: str, data: Mapping[str, Any]) -> bool:
    """Whether a task's data is the paper's: as many classes and validation images, and tested on these."""
    reference = paper()["data"].get(task)
    return (
        bool(reference)
        and data.get("split", "val") == "val"
        and all(data.get(key) == reference[key] for key in ("num_classes", "val_images"))
    )


def claims(model: str) -> list[Claim]:
    """What others report as a model's throughput."""
    return [
        Claim(row["images_per_s"], entry["hardware"], entry.get("batch_size"), entry["source"])
        for entry in paper()["reported_elsewhere"]
        for row in entry["rows"]
        if row.get("model") == model
    ]
