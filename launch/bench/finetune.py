"""Training on one's own data in one call of Python: `evmamba.train`."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rich.console import Console

from evmamba.errors import UserError
from evmamba.launch.bench.graph import BATCH_OPTION, CHECKPOINT_OPTION
from evmamba.launch.bench.local import run_here
from evmamba.launch.bench.plan import BenchOptions, plan
from evmamba.launch.bench.progress import RunProgress
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
from evmamba.launch.fit.training import cli_arguments
from evmamba.launch.report.build import print_table, write_report
from evmamba.launch.report.table import build_table
from evmamba.launch.store.devices import choose_device
from evmamba.launch.store.results import Result
from evmamba.launch.store.spec import RUNS_FOLDER, TrainingSpec
from evmamba.tasks import TASKS
from evmamba.tasks.backbones import PRETRAINED
from evmamba.tasks.check import recognise
from evmamba.tasks.data import EMBEDDED

# Their module looks for the batch; it must not have a share of this process's GPU memory.
BATCH_FINDER = "evmamba.launch.fit.batch_size"
EPOCHS_OPTION = "trainer.max_epochs"


def train(
    data: str | PathLike[str],
    *,
    task: str | None = None,
    backbone: str = "efficientvmamba_t",
    pretrained: bool | str | PathLike[str] = True,
    head: str | None = None,
    preset: str = "finetune",
    epochs: int | None = None,
    batch_size: int | Literal["auto"] | None = None,
    output: str | PathLike[str] = "finetuned",
    seed: int = 0,
    device: str = "auto",
    precision: str | None = None,
    loggers: Sequence[str] = (),
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Result:
    """Train a network on images in folders, test the best weights, and write a report.

    The same call goes on where an interrupted one stopped, and returns a finished one's result at once.

    Args:
        data: folder in one of the layouts of docs/data.md (class folders, COCO, YOLO, label pictures), or "embedded".
        task: its name; None: the layout tells.
        backbone: one of ours or timm's, by name.
        pretrained: True starts from the weights published for the backbone, False from random ones; else a file, a
            URL, or ``hf-hub:USER/REPOSITORY``.
        head: e.g. ``"retinanet"``; None: the task's default.
        preset: which of the task's recipes: finetune, small or tiny.
        epochs: in place of the recipe's length.
        batch_size: images per step; "auto": the largest power of two for which the GPU has memory (on a CPU the
            recipe's). A recipe whose learning rate is for some batch scales it.
        output: folder of the report and of the run.
        seed: of everything.
        device: "auto", "cpu" or "cuda".
        precision: Lightning's name; None: bf16-mixed on a GPU that has it.
        loggers: e.g. ``["wandb"]``, see `evmamba.launch.fit.loggers`.
        options: more of `evmamba fit`'s options, e.g. ``{"model.init_args.optimizer.layer_decay": 0.9}``.

    Returns:
        The result: ``metrics``, ``training`` and, in ``folder``, ``checkpoints/best.ckpt`` for `evmamba predict`,
        ``weights.safetensors`` and a gallery.

    Raises:
        UserError: wrong names or options, data or weights that cannot be used, or a training that failed, with the
            reason.
    """
    quiet_warnings()
    quiet_logs()
    embedded = fspath(data) == EMBEDDED
    if embedded and task is None:
        raise UserError(f"say which task the embedded data is for: task='{next(iter(TASKS))}', ...")
    record = TASKS[task] if task else recognise(_folder(data))
    told: dict[str, Any] = {CHECKPOINT_OPTION: _checkpoint(pretrained)}
    if epochs is not None:
        told |= {EPOCHS_OPTION: epochs, "trainer.max_steps": -1}
    if isinstance(batch_size, int):
        told[BATCH_OPTION] = batch_size
    bench = BenchOptions(
        output=Path(output),
        backbones=[backbone],
        tasks=[record.name],
        data={} if embedded else {record.name: fspath(data)},
        heads={record.name: [head]} if head else {},
        preset=preset,
        seeds=[seed],
        device=device,
        precision=precision,
        loggers=loggers,
    )
    bench.overrides = [_override(name, value) for name, value in (told | dict(options)).items()]
    spec = _training_of(bench)
    if batch_size == "auto" and choose_device(device) != "cpu":
        bench.overrides = [*bench.overrides, _override(BATCH_OPTION, _largest_batch(spec, bench.output))]
        spec = _training_of(bench)
    console = Console()
    results, interrupted = run_here([spec], bench.output, RunProgress(console, 1))
    table = build_table(results, models=[backbone])
    write_report(table, bench.output)
    print_table(table, console)
    if interrupted:
        raise KeyboardInterrupt
    result = results[0]
    if not result.finished:
        raise UserError(f"the training failed: {result.reason}")
    result.folder = bench.output / RUNS_FOLDER / spec.name
    return result


def _folder(data: str | PathLike[str]) -> Path:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"data folder not found: {folder}")
    return folder


def _checkpoint(pretrained: bool | str | PathLike[str]) -> str | None:
    if isinstance(pretrained, bool):
        return PRETRAINED if pretrained else None
    text = fspath(pretrained)
    # The run has the folder of its own spec, not this one.
    return str(Path(text).expanduser().absolute()) if Path(text).expanduser().is_file() else text


def _override(name: str, value: Any) -> str:
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def _training_of(options: BenchOptions) -> TrainingSpec:
    (spec,) = (spec for spec in plan(options) if isinstance(spec, TrainingSpec))
    return spec


def _largest_batch(spec: TrainingSpec, output: Path) -> int:
    arguments = cli_arguments(spec, output / RUNS_FOLDER / spec.name)
    command = [sys.executable, "-m", BATCH_FINDER, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"no batch size could be found: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])
