"""Small sound data sets to damage, and what a check then finds."""

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from evmamba.tasks.check import check_data
from evmamba.tasks.embedded import write_classification, write_detection, write_segmentation
from evmamba.tasks.findings import Findings

WRITERS = {"classification": write_classification, "detection": write_detection, "segmentation": write_segmentation}


def check(root: Path, task: str | None = None, jobs: int = 1, **options: Any) -> Findings:
    return check_data(root, task, jobs, Console(file=StringIO()), options)


def found(root: Path, **options: Any) -> list[str]:
    """Every problem as one line."""
    problems = check(root, **options).problems
    return [f"{problem.level}: {problem.text}: {'; '.join(problem.examples)}" for problem in problems]


def the_problem(root: Path, **options: Any) -> str:
    problems = found(root, **options)
    assert len(problems) == 1, problems
    return problems[0]


def images_of(root: Path, split: str) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png") and split in path.parts)


def add_test(root: Path) -> None:
    """A labelled test split: another copy of the validation split, in any layout."""
    for path in sorted(root.rglob("*val*")):
        if path.is_dir():
            shutil.copytree(path, path.with_name("test"))
        elif path.parent.name == "annotations":
            shutil.copy(path, path.with_name(path.name.replace("val", "test")))


def edit(root: Path, change: Callable[[dict], None], split: str = "train") -> Path:
    (file,) = root.glob(f"annotations/*{split}*.json")
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file
