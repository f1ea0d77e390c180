"""COCO annotations and the images that they name, looked at before a training."""

from collections import Counter
from pathlib import Path

from evmamba.errors import UserError
from evmamba.tasks.check import Check, Looker, count_classes, look_at_images, warn_unlearnt
from evmamba.tasks.data import SPLITS, TEST, Split
from evmamba.tasks.detection.annotations import CocoAnnotations, ImageRecord, NoMasksError, read_annotations
from evmamba.tasks.detection.data import find_split, find_test_split, yolo_of
from evmamba.tasks.detection.yolo import is_description
from evmamba.tasks.findings import Findings, count_of
from evmamba.tasks.images import is_image_file
from evmamba.tasks.inspection import Place
from evmamba.tasks.plain_files import is_file


def has_layout(root: Path) -> bool:
    """Whether there are annotation files."""
    description = yolo_of(root)
    return any((root / "annotations").glob("*.json")) or (description is not None and is_description(description))


def look(findings: Findings, looker: Looker) -> None:
    """Read all annotation files and look at every image that they name."""
    read: dict[Split, CocoAnnotations] = {}
    records: dict[Split, list[ImageRecord]] = {split: [] for split in SPLITS}
    places: dict[Split, list[Place]] = {split: [] for split in SPLITS}
    for split in (*SPLITS, TEST):
        try:
            place = find_test_split(findings.root) if split == TEST else find_split(findings.root, split)
            if place is None:
                continue
            folder, file = place
            if yolo_of(findings.root):
                findings.layout = "YOLO"
            else:
                inside = folder.relative_to(findings.root).as_posix().replace(split, "{train,val}")
                findings.layout = findings.layout or f"COCO, {inside}"
            row = looker.bar.add_task(f"{split} annotations", total=1)
            read[split] = annotations = _annotations(findings, file)
            looker.bar.advance(row)
        except UserError as error:
            findings.error(str(error))
            continue
        counts = annotations.counts
        boxes = counts["boxes"] + counts["without_mask"]
        findings.splits[split] = {"boxes": boxes, "crowds": counts["crowds"], "without boxes": counts["without_boxes"]}
        if not boxes:
            findings.error(f"{file} has no usable box")
        if counts["no_area"]:
            findings.warn(f"{count_of(counts['no_area'], 'box')} of no area in {file.name}; not trained on")
        if counts["clipped"]:
            findings.warn(f"{count_of(counts['clipped'], 'box')} reaching outside the image in {file.name}; clipped")
        if 0 < counts["without_mask"] < boxes:
            findings.warn(
                f"{count_of(counts['without_mask'], 'box')} without a mask in {file.name}; not for Mask R-CNN"
            )
        named = {record.file_name for record in annotations.images}
        missing = [name for name in sorted(named) if not is_file(folder / name)]
        if missing:
            findings.error(f"{count_of(missing, 'image')} named in {file} and not in {folder}", missing)
        if len(named) < len(annotations.images):
            findings.error(f"{len(annotations.images) - len(named)} images in {file} share a file with another one")
        unnamed = sorted(path.name for path in folder.iterdir() if is_image_file(path) and path.name not in named)
        if unnamed:
            findings.warn(f"{count_of(unnamed, 'image')} in {folder} and not named in {file.name}", unnamed)
        absent = set(missing)
        records[split] = [record for record in annotations.images if record.file_name not in absent]
        files = [folder / record.file_name for record in records[split]]
        places[split] = [Place(str(file), file) for file in files]
    if read.keys() >= set(SPLITS):
        ours, *others = (set(zip(a.category_ids, a.class_names, strict=True)) for a in read.values())
        for split, theirs in zip(findings.evaluated, others, strict=True):
            if ours != theirs:
                odd = [f"{name} (id {identity})" for identity, name in sorted(ours ^ theirs)]
                findings.error(f"the categories of train and {split} differ", odd)
        count_classes(findings, {split: _boxes_per_class(annotations) for split, annotations in read.items()})
        warn_unlearnt(findings, "boxes")
    for split, looks in look_at_images(findings, looker, places).items():
        wrong = [
            f"{place.name} is {look.width}x{look.height}, annotated as {record.width}x{record.height}"
            for (place, look), record in zip(looks, records[split], strict=True)
            if look.error is None and (record.width, record.height) not in look.sizes
        ]
        if wrong:
            findings.error(f"{count_of(wrong, 'image')} of {split} of another size than annotated", wrong)


def _annotations(findings: Findings, file: Path) -> CocoAnnotations:
    """With masks where they are good."""
    try:
        return read_annotations(file, masks=True)
    except NoMasksError:
        return read_annotations(file)
    except UserError as error:
        annotations = read_annotations(file)
        findings.warn("masks that cannot be used; Mask R-CNN will refuse this file", [str(error)])
        return annotations


def _boxes_per_class(annotations: CocoAnnotations) -> Counter[str]:
    counts = Counter(dict.fromkeys(annotations.class_names, 0))
    for record in annotations.images:
        counts.update(annotations.class_names[label] for label in record.labels)
    return counts


CHECK = Check(has_layout, look)
