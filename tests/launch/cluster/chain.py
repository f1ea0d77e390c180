"""Three runs, each of which needs the one before, as `evmamba submit` leaves them."""

import json
from pathlib import Path

from evmamba.launch.cluster.jobs import JobBook
from evmamba.launch.store.results import write_result
from evmamba.launch.store.spec import EvaluationSpec, Spec, Start

from ..handmade import made_result, made_spec

FIRST = made_spec("classification")
SECOND = made_spec("segmentation", test=False).after(FIRST)
THIRD = EvaluationSpec(
    task="segmentation",
    model="resnet18",
    head="upernet",
    seed=0,
    device="cpu",
    settings={},
    start=Start.of(SECOND),
    needs=(SECOND.name,),
)
CHAIN = (FIRST, SECOND, THIRD)


def submitted(folder: Path) -> Path:
    """All of `CHAIN`, as jobs 1, 2, 3."""
    for spec in CHAIN:
        spec.write(folder / "runs" / spec.name)
    book = JobBook(folder, order=[spec.name for spec in CHAIN])
    for job, spec in enumerate(CHAIN, 1):
        book.add(spec.name, job)
    return folder


def folder_of(output: Path, spec: Spec) -> Path:
    return output / "runs" / spec.name


def say_progress(output: Path, spec: Spec, **fields) -> None:
    text = json.dumps({"phase": "training", "done": 43, "total": 100, "loss": 1.2345} | fields)
    (folder_of(output, spec) / "progress.json").write_text(text)


def finish(output: Path, spec: Spec) -> None:
    result = made_result(spec.task, "resnet18", run=spec.name)
    write_result(result, folder_of(output, spec))
