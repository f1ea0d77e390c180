"""`evmamba data check`: everything that would stop a training, or spoil it, found before the job is submitted."""

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evmamba.errors import UserError, unknown_name
from evmamba.launch.bench.suites import TASKS
from evmamba.launch.datafindings import SPLITS, DataCheck, count_of
from evmamba.tasks.classification.folders import list_split
from evmamba.tasks.classification.shards import list_shards, read_shards
from evmamba.tasks.detection.annotations import CocoAnnotations, read_annotations
from evmamba.tasks.detection.data import Split, find_split
from evmamba.tasks.images import is_image_file
from evmamba.tasks.inspection import Look, Place, look_at, look_at_all, workers
from evmamba.tasks.segmentation.data import SPLITS as FOLDERS
from evmamba.tasks.segmentation.data import find_pairs, read_class_names
from evmamba.tasks.segmentation.labels import LabelMap
from evmamba.tasks.segmentation.scan import look_at_pair


@dataclass(frozen=True)
class LabelOptions:
    """The options of SegmentationData that say what label numbers mean."""

    num_classes: int | None = None
    reduce_zero_label: bool | None = None
    ignore_label: int | None = None


class Looker:
    """Looks at files with several processes, and shows how far it is."""

    def __init__(self, pool: Executor | None, bar: Progress) -> None:
        self.pool = pool
        self.bar = bar

    def __call__(self, look: Any, items: Sequence[Any], what: str) -> list[Any]:
        row = self.bar.add_task(what, total=len(items))
        return look_at_all(self.pool, look, items, lambda count: self.bar.advance(row, count))


def check_data(
    root: Path, task: str | None, jobs: int | None, console: Console, labels: LabelOptions = LabelOptions()
) -> DataCheck:
    """Look at every file of a data set.

    Args:
        root: the folder.
        task: which task it is for; None: the layout tells.
        jobs: processes; None: one a core.
        console: where the progress bar goes.
        labels: what label numbers mean, for segmentation.

    Raises:
        UserError: no such folder, or a layout of no task or of several.
    """
    if not root.is_dir():
        raise UserError(f"data folder not found: {root}")
    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    check = DataCheck(root, task or recognise(root))
    began = time.monotonic()
    with _looking(jobs or _cores(), console) as looker:
        if check.task == "classification":
            check_classification(check, looker)
        elif check.task == "detection":
            check_detection(check, looker)
        else:
            check_segmentation(check, looker, labels)
    check.problems.sort(key=lambda problem: problem.level)
    check.seconds = time.monotonic() - began
    return check


def recognise(root: Path) -> str:
    """Tell the task by the layout.

    Raises:
        UserError: a layout of no task or of several; says what is there.
    """
    found = {
        "classification": bool(list_shards(root, "train")) or any((root / split).is_dir() for split in SPLITS),
        "detection": any((root / "annotations").glob("*.json")),
        "segmentation": any((root / "annotations" / folder).is_dir() for folder in FOLDERS.values()),
    }
    tasks = [task for task in TASKS if found[task]]
    if len(tasks) > 1:
        raise UserError(f"{root} has the layouts of {' and '.join(tasks)}; say which one with --task")
    if not tasks:
        inside = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        shown = f"it has {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else "it is empty"
        raise UserError(f"{root} has the layout of no task ({shown}); the layouts are in docs/data.md")
    return tasks[0]


@contextmanager
def _looking(jobs: int, console: Console) -> Iterator[Looker]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with workers(jobs) as pool, bar:
        yield Looker(pool, bar)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_classification(check: DataCheck, looker: Looker) -> None:
    sharded = any(list_shards(check.root, split) for split in SPLITS)
    check.layout = "tar shards" if sharded else "class folders"
    places: dict[Split, list[Place]] = {split: [] for split in SPLITS}
    counts: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
    if sharded:
        try:
            splits, names = read_shards(check.root)
        except UserError as error:
            return check.error(str(error))
        for split in SPLITS:
            images = splits[split]
            check.splits[split]["shards"] = len(images.files)
            for k in range(len(images)):
                file = images.files[images.shard[k]]
                name = f"{images.name(k)} in shard {file}"
                places[split].append(Place(name, file, int(images.offset[k]), images.size_of(k)))
                counts[split][names[images.labels[k]]] += 1
    else:
        for split in SPLITS:
            try:
                listed = list_split(check.root, split)
            except UserError as error:
                check.error(str(error))
                continue
            counts[split].update({name: len(paths) for name, paths in listed.items()})
            places[split] = [Place(str(path), path) for paths in listed.values() for path in paths]
        if all(counts.values()):
            for split, other in (SPLITS, SPLITS[::-1]):
                lacking = sorted(counts[split].keys() - counts[other].keys())
                if lacking:
                    check.error(f"{count_of(lacking, 'class')} of {split} without a folder in {other}", lacking)
            if len(counts["train"]) == 1:
                check.error("there is only one class; at least two are needed", counts["train"])
    _count_classes(check, counts)
    for split in SPLITS:
        if counts[split]:
            check.splits[split]["images a class"] = _spread(counts[split].values())
    _look_at_images(check, looker, places)


def check_detection(check: DataCheck, looker: Looker) -> None:
    read: dict[Split, CocoAnnotations] = {}
    places: dict[Split, list[Place]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        try:
            folder, file = find_split(check.root, split)
            check.layout = f"COCO, {folder.relative_to(check.root).as_posix().replace(split, '{train,val}')}"
            row = looker.bar.add_task(f"{split} annotations", total=1)
            read[split] = annotations = _annotations(check, file)
            looker.bar.advance(row)
        except UserError as error:
            check.error(str(error))
            continue
        counts = annotations.counts
        boxes = counts["boxes"] + counts["without_mask"]
        check.splits[split] |= {"boxes": boxes, "crowds": counts["crowds"], "without boxes": counts["without_boxes"]}
        if not boxes:
            check.error(f"{file} has no usable box")
        if counts["no_area"]:
            check.warn(f"{count_of(counts['no_area'], 'box')} of no area in {file.name}; not trained on")
        if counts["clipped"]:
            check.warn(f"{count_of(counts['clipped'], 'box')} reaching outside the image in {file.name}; clipped")
        if 0 < counts["without_mask"] < boxes:
            check.warn(f"{count_of(counts['without_mask'], 'box')} without a mask in {file.name}; not for Mask R-CNN")
        named = {record.file_name for record in annotations.images}
        missing = [name for name in sorted(named) if not (folder / name).is_file()]
        if missing:
            check.error(f"{count_of(missing, 'image')} named in {file} and not in {folder}", missing)
        if len(named) < len(annotations.images):
            check.error(f"{len(annotations.images) - len(named)} images in {file} share a file with another one")
        unnamed = sorted(path.name for path in folder.iterdir() if is_image_file(path) and path.name not in named)
        if unnamed:
            check.warn(f"{count_of(unnamed, 'image')} in {folder} and not named in {file.name}", unnamed)
        absent = set(missing)
        records = [record for record in annotations.images if record.file_name not in absent]
        places[split] = [Place(str(folder / record.file_name), folder / record.file_name) for record in records]
    if len(read) == len(SPLITS):
        ours, theirs = (set(zip(a.category_ids, a.class_names, strict=True)) for a in read.values())
        if ours != theirs:
            odd = [f"{name} (id {identity})" for identity, name in sorted(ours ^ theirs)]
            check.error("the categories of train and val differ", odd)
        _count_classes(check, {split: _boxes_per_class(annotations) for split, annotations in read.items()})
        _warn_unlearnt(check, "boxes")
    for split, looks in _look_at_images(check, looker, places).items():
        if split in read:
            sizes = {record.file_name: (record.width, record.height) for record in read[split].images}
            folder = find_split(check.root, split)[0]
            pairs = [(place, look, sizes[str(place.file.relative_to(folder))]) for place, look in looks]
            wrong = [
                f"{place.name} is {look.width}x{look.height}, annotated as {size[0]}x{size[1]}"
                for place, look, size in pairs
                if look.error is None and size not in look.sizes
            ]
            if wrong:
                check.error(f"{count_of(wrong, 'image')} of {split} of another size than annotated", wrong)


def _annotations(check: DataCheck, file: Path) -> CocoAnnotations:
    """With masks where they are good."""
    try:
        return read_annotations(file, masks=True)
    except UserError as error:
        annotations = read_annotations(file)
        if "holds no masks" not in str(error):
            check.warn("masks that cannot be used; Mask R-CNN will refuse this file", [str(error)])
        return annotations


def _boxes_per_class(annotations: CocoAnnotations) -> Counter[str]:
    counts = Counter(dict.fromkeys(annotations.class_names, 0))
    for record in annotations.images:
        counts.update(annotations.class_names[label] for label in record.labels)
    return counts


def check_segmentation(check: DataCheck, looker: Looker, options: LabelOptions) -> None:
    check.layout = "images/ and annotations/"
    places: dict[Split, list[Place]] = {split: [] for split in SPLITS}
    holders: dict[Split, Counter[int]] = {split: Counter() for split in SPLITS}
    first: dict[int, str] = {}
    for split in SPLITS:
        try:
            pairs = find_pairs(check.root, FOLDERS[split])
        except UserError as error:
            check.error(str(error))
            continue
        places[split] = [Place(str(pair.image), pair.image) for pair in pairs]
        found = looker(look_at_pair, pairs, f"{split} labels")
        for kind, text in (("unreadable", "cannot be read"), ("mismatched", "of another size than the image")):
            problems = [problem for problem, its_kind, _ in found if its_kind == kind]
            if problems:
                check.error(f"{count_of(problems, 'label file')} of {split} {text}", problems)
        for pair, (_, _, values) in zip(pairs, found, strict=True):
            holders[split].update(values)
            for value in values:
                first.setdefault(value, str(pair.label))
    _look_at_images(check, looker, places)
    try:
        label_map, names = _label_map(check, set(first), options)
    except UserError as error:
        return check.error(str(error))
    wrong = [value for value in sorted(first) if not label_map.is_valid(value)]
    if wrong:
        text = f"{count_of(wrong, 'label')} out of range: {label_map.num_classes} classes are labels {label_map.range}"
        check.error(text, [f"{value} in {first[value]}" for value in wrong])
    by_class = {
        split: Counter({name: holders[split][k + label_map.first] for k, name in enumerate(names)}) for split in SPLITS
    }
    _count_classes(check, by_class)
    _warn_unlearnt(check, "pixels")
    for split in SPLITS:
        check.splits[split]["classes that occur"] = sum(count > 0 for count in by_class[split].values())
        if places[split] and not check.splits[split]["classes that occur"]:
            check.error(f"not one pixel of {split} has a class ({label_map.range})")


def _label_map(check: DataCheck, labels: set[int], options: LabelOptions) -> tuple[LabelMap, list[str]]:
    names = read_class_names(check.root)
    if not names:
        start = LabelMap(1, options.reduce_zero_label, options.ignore_label).first
        highest = max((label for label in labels if label >= start and label != options.ignore_label), default=start)
        count = options.num_classes or highest + 1 - start
        names = [f"class {k + start}" for k in range(count)]
        if options.num_classes is None:
            check.warn(f"no classes.txt; the highest label is {highest}, so there would be {count} classes")
    return LabelMap(len(names), options.reduce_zero_label, options.ignore_label), names


def _count_classes(check: DataCheck, counts: dict[Split, Counter[str]]) -> None:
    names = list(dict.fromkeys(name for split in counts.values() for name in split))
    check.per_class = {name: {split: counts[split][name] for split in SPLITS} for name in names}
    for split in SPLITS:
        check.splits[split]["classes"] = len(counts[split])


def _warn_unlearnt(check: DataCheck, what: str) -> None:
    unlearnt = [name for name, count in check.per_class.items() if count["val"] and not count["train"]]
    if unlearnt:
        check.warn(f"{count_of(unlearnt, 'class')} with {what} in val and none in train", unlearnt)


def _look_at_images(
    check: DataCheck, looker: Looker, places: dict[Split, list[Place]]
) -> dict[Split, list[tuple[Place, Look]]]:
    """Decode all images; unreadable ones are errors, the same file in train and val is a warning."""
    looks: dict[Split, list[tuple[Place, Look]]] = {}
    for split in SPLITS:
        found: list[Look] = looker(look_at, places[split], f"{split} images")
        looks[split] = list(zip(places[split], found, strict=True))
        check.images += len(found)
        good = [look for look in found if look.error is None]
        facts: dict[str, Any] = {"images": len(found)}
        if good:
            facts["short side"] = _spread(min(look.width, look.height) for look in good)
            facts["MB"] = round(sum(look.size for look in found) / 1e6, 1)
        check.splits[split] = facts | check.splits[split]
        bad = [look.error for look in found if look.error]
        if bad:
            check.error(f"{count_of(bad, 'image')} of {split} cannot be read", bad)
    trained = {look.digest: place.name for place, look in looks["train"] if look.error is None}
    both = [f"{place.name} is {trained[look.digest]}" for place, look in looks["val"] if look.digest in trained]
    if both:
        check.warn(f"{count_of(both, 'image')} of val in train too, byte for byte", both)
    return looks


def _spread(values: Iterable[int]) -> str:
    """Least, median and most."""
    ordered = sorted(values)
    return " / ".join(str(value) for value in (ordered[0], statistics.median_low(ordered), ordered[-1]))
