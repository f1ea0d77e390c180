"""Class folders or tar shards, looked at before a training."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path

from evmamba.errors import UserError, printable
from evmamba.tasks.check import Check, Looker, count_classes, look_at_images, spread
from evmamba.tasks.classification.folders import has_test, list_split
from evmamba.tasks.classification.shards import list_shards, read_shards
from evmamba.tasks.data import SPLITS, TEST, Split
from evmamba.tasks.findings import Findings, count_of
from evmamba.tasks.inspection import Place


def has_layout(root: Path) -> bool:
    """Whether there are splits with folders or shards."""
    return bool(list_shards(root, "train")) or any((root / split).is_dir() for split in SPLITS)


def look(findings: Findings, looker: Looker) -> None:
    """Count the classes and look at every image."""
    sharded = any(list_shards(findings.root, split) for split in SPLITS)
    findings.layout = "tar shards" if sharded else "class folders"
    places: dict[Split, list[Place]] = {split: [] for split in SPLITS}
    counts: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
    if sharded:
        try:
            splits, names = read_shards(findings.root)
        except UserError as error:
            return findings.error(str(error))
        for split in SPLITS if TEST not in splits else (*SPLITS, TEST):
            images = splits[split]
            findings.splits[split] = {"shards": len(images.files)}
            places[split], counts[split] = [], Counter()
            for k in range(len(images)):
                file = images.files[images.shard[k]]
                name = f"{images.name(k)} in shard {file}"
                places[split].append(Place(name, file, int(images.offset[k]), images.size_of(k)))
                counts[split][names[images.labels[k]]] += 1
    else:
        classes: Collection[str] = ()
        for split in (*SPLITS, TEST):
            if split == TEST and not has_test(findings.root, classes):
                continue
            try:
                listed = list_split(findings.root, split)
            except UserError as error:
                findings.error(str(error))
                continue
            counts[split] = Counter({printable(name): len(paths) for name, paths in listed.items()})
            places[split] = [Place(str(path), path) for paths in listed.values() for path in paths]
            findings.splits.setdefault(split, {})
            classes = classes or listed
        if all(counts.values()):
            train = counts["train"].keys()
            for split in findings.evaluated:
                evaluated = counts[split].keys()
                if lacking := sorted(train - evaluated):
                    findings.error(f"{count_of(lacking, 'class')} of train without a folder in {split}", lacking)
                if odd := sorted(evaluated - train):
                    findings.error(f"{count_of(odd, 'class')} of {split} without a folder in train", odd)
            if len(counts["train"]) == 1:
                findings.error("there is only one class; at least two are needed", counts["train"])
    count_classes(findings, counts)
    for split in counts:
        if counts[split]:
            findings.splits[split]["images a class"] = spread(counts[split].values())
    look_at_images(findings, looker, places)


CHECK = Check(has_layout, look)
