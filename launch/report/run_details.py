"""What the page says about single runs: facts and provenance, numbers per class, confusions, pictures."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.launch.report.columns import head_of
from evmamba.launch.report.paper import label_of
from evmamba.launch.report.seeds import estimate
from evmamba.launch.report.table import DASH
from evmamba.launch.store.estimates import read_estimate
from evmamba.launch.store.results import FILE_NAME, Result, code_of
from evmamba.tasks import TASKS
from evmamba.tasks.images import read_image
from evmamba.tasks.plain_files import is_file

PICTURE_WIDTH = 900
PICTURES_A_RUN = 6
WORST = "worst"  # the beginning of a worst case's file name
CLASSES_SHOWN = 40
CONFUSIONS_SHOWN = 25
# How much of the data a class is.
CLASS_SIZES = ("images", "pixel_share", "annotations")


def title_of_run(result: Result) -> str:
    seed = result.provenance.get("seed")
    head = head_of(result.task, result.head)
    parts = [label_of(result.model), result.task, head.name if head else None]
    return " · ".join([*filter(None, parts), *([f"seed {seed}"] if seed is not None else [])])


def facts_of(result: Result) -> dict[str, str]:
    """Names and sentences: what was measured, on what, with which code, when."""
    origin = result.provenance
    data = ("name", "split", "train_images", "val_images", "test_images", "num_classes", "fingerprint")
    files = [FILE_NAME, *result.details.get("files", []), *result.gallery[:1]]
    facts = {
        "metrics": sentence({k: f"{v:.4f}" for k, v in result.metrics.items() if v is not None}),
        "cost": sentence(result.cost),
        "data": sentence(result.data or {}, data),
        "protocol": sentence(result.protocol),
        "training": sentence({k: v for k, v in result.training.items() if not isinstance(v, list | dict)}),
        "device": sentence(origin, ("device", "precision", "nodes", "processes", "threads")),
        "commit": code_of(origin, 40),
        "versions": sentence(origin.get("versions", {})),
        "configuration": sentence(origin, ("config_hash", "spec_hash", "seed", "init_from")),
        "start": str(origin.get("start") or ""),
        "duration": f"{origin['duration_s']:,.0f} s" if origin.get("duration_s") is not None else "",
        "estimate": _estimate(result),
        "files": f"{result.folder.name}/: {', '.join(files)}" if result.folder else "",
    }
    return {name: text for name, text in facts.items() if text}


def _estimate(result: Result) -> str:
    found = read_estimate(result.folder) if result.folder else None
    seconds = result.training.get("seconds")
    return found.beside(seconds) if found and seconds else ""


def sentence(values: Mapping[str, Any], keys: Sequence[str] | None = None) -> str:
    """``name value, name value`` of what is not None."""
    names = keys or list(values)
    return ", ".join(
        f"{name.replace('_', ' ')} {_short(values[name], 'x' if name == 'input_size' else ' ')}"
        for name in names
        if values.get(name) not in (None, [], (), {})
    )


def _short(value: Any, between: str = " ") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return between.join(map(str, value))
    if isinstance(value, dict):
        return f"({sentence(value)})"
    return str(value)


def per_class(results: Sequence[Result]) -> dict[str, Any] | None:
    """Classes over models, in percent and averaged over seeds: ``{"labels", "rows": [(class, [text])], "left_out"}``.

    At most `CLASSES_SHOWN` classes, the largest ones where the task says how large they are, without those that no
    model has a number for; the rest stays in the results' files.
    """
    results = [result for result in results if result.finished and isinstance(result.details.get("per_class"), dict)]
    key = TASKS[results[0].task].class_metric if results else None
    if key is None:
        return None
    labels = list(dict.fromkeys(label_of(result.model) for result in results))
    classes: dict[str, float] = {}
    for result in results:
        for name, values in result.details["per_class"].items():
            sizes = [float(values[size]) for size in CLASS_SIZES if values.get(size) is not None]
            if values.get(key) is not None:
                classes[name] = max(classes.get(name, 0.0), *sizes, 0.0)
    shown = sorted(classes, key=lambda name: -classes[name])[:CLASSES_SHOWN]  # stable: the data's order where all are 0
    rows = []
    for name in shown:
        cells = []
        for label in labels:
            mean = estimate(
                result.details["per_class"].get(name, {}).get(key)
                for result in results
                if label_of(result.model) == label
            )
            cells.append(f"{mean.mean * 100:.1f}" if mean else DASH)
        rows.append((name, cells))
    return {"metric": key, "labels": labels, "rows": rows, "left_out": len(classes) - len(shown)} if rows else None


def confusion(result: Result) -> tuple[list[list[float]], list[str], int] | None:
    """Of the most frequent classes, which share of each (rows) was predicted as which (columns); their names, and how
    many classes are left out. Shares are of all predictions, also of those not shown."""
    matrix, classes = result.details.get("confusion"), result.details.get("per_class")
    if not matrix or not isinstance(classes, dict) or len(matrix) != len(classes):
        return None
    sizes = [sum(row) for row in matrix]
    present = [k for k in range(len(matrix)) if sizes[k]]
    kept = sorted(sorted(present, key=lambda k: -sizes[k])[:CONFUSIONS_SHOWN])
    if len(kept) < 2:
        return None
    names = list(classes)
    shares = [[matrix[r][c] / sizes[r] for c in kept] for r in kept]
    return shares, [names[k] for k in kept], len(present) - len(kept)


def pictures(result: Result) -> list[dict[str, Any]]:
    """The first pictures of a run's gallery and its worst cases, scaled down, as data URIs; wide ones show several
    views side by side."""
    worst = [name for name in result.gallery if Path(name).name.startswith(WORST)]
    plain = [name for name in result.gallery if name not in worst]
    found = []
    for name in [*plain[:PICTURES_A_RUN], *worst]:
        folder = (result.folder or Path()).resolve()
        path = folder / name
        if not is_file(path):
            continue
        if not path.resolve().is_relative_to(folder):
            raise UserError(f"{folder / FILE_NAME} names a picture out of its folder, {name}")
        small = read_image(path)
        wide = small.width > 1.5 * small.height
        small.thumbnail((PICTURE_WIDTH if wide else PICTURE_WIDTH // 2, PICTURE_WIDTH))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=78, optimize=True)
        uri = "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
        found.append({"uri": uri, "wide": wide, "size": small.size, "worst": name in worst})
    return found
