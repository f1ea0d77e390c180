"""Images and their label files, looked at before a training."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.tasks.check import Check, Looker, count_classes, look_at_images, warn_unlearnt
from evmamba.tasks.data import Split
from evmamba.tasks.findings import Findings, count_of
from evmamba.tasks.inspection import Place
from evmamba.tasks.segmentation.data import SPLITS, find_pairs, folders_of, read_class_names
from evmamba.tasks.segmentation.label_index import look_at_pair
from evmamba.tasks.segmentation.labels import LabelMap


def has_layout(root: Path) -> bool:
    """Whether there are folders of label files."""
    return any((root / "annotations" / folder).is_dir() for folder in SPLITS.values())


def look(
    findings: Findings,
    looker: Looker,
    num_classes: int | None = None,
    reduce_zero_label: bool | None = None,
    ignore_label: int | None = None,
) -> None:
    """Read every label file and look at every image; the options are those of `SegmentationData`."""
    findings.layout = "images/ and annotations/"
    folders = folders_of(findings.root)
    findings.splits = {split: {} for split in folders}
    places: dict[Split, list[Place]] = {split: [] for split in folders}
    holders: dict[Split, Counter[int]] = {split: Counter() for split in folders}
    first: dict[int, str] = {}
    for split, folder in folders.items():
        try:
            pairs = find_pairs(findings.root, folder)
        except UserError as error:
            findings.error(str(error))
            continue
        places[split] = [Place(str(pair.image), pair.image) for pair in pairs]
        found = looker(look_at_pair, pairs, f"{split} labels")
        for kind, text in (("unreadable", "cannot be read"), ("mismatched", "of another size than the image")):
            problems = [problem for problem, its_kind, _ in found if its_kind == kind]
            if problems:
                findings.error(f"{count_of(problems, 'label file')} of {split} {text}", problems)
        for pair, (_, _, values) in zip(pairs, found, strict=True):
            holders[split].update(values)
            for value in values:
                first.setdefault(value, str(pair.label))
    look_at_images(findings, looker, places)
    try:
        numbering: dict[str, Any] = {"reduce_zero_label": reduce_zero_label, "ignore_label": ignore_label}
        names = read_class_names(findings.root) or _numbered(findings, set(first), num_classes, numbering)
        label_map = LabelMap(len(names), **numbering)
    except UserError as error:
        return findings.error(str(error))
    wrong = [value for value in sorted(first) if not label_map.is_valid(value)]
    if wrong:
        text = f"{count_of(wrong, 'label')} out of range: {label_map.num_classes} classes are labels {label_map.range}"
        findings.error(text, [f"{value} in {first[value]}" for value in wrong])
    by_class = {
        split: Counter({name: values[k + label_map.first] for k, name in enumerate(names)})
        for split, values in holders.items()
    }
    count_classes(findings, by_class)
    warn_unlearnt(findings, "pixels")
    for split in folders:
        findings.splits[split]["classes that occur"] = sum(count > 0 for count in by_class[split].values())
        if places[split] and not findings.splits[split]["classes that occur"]:
            findings.error(f"not one pixel of {split} has a class ({label_map.range})")


def _numbered(findings: Findings, labels: set[int], num_classes: int | None, numbering: Mapping[str, Any]) -> list[str]:
    """Names of classes that no file names: as many as are said, else as the labels that occur."""
    start = LabelMap(1, **numbering).first
    highest = max((label for label in labels if label >= start and label != numbering["ignore_label"]), default=start)
    count = num_classes or highest + 1 - start
    if num_classes is None:
        findings.warn(f"no classes.txt; the highest label is {highest}, so there would be {count} classes")
    return [f"class {k + start}" for k in range(count)]


CHECK = Check(has_layout, look)
