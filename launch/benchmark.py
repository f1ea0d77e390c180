"""`evmamba bench`: which runs make a benchmark, and running them here, one process each, one after the other.

`plan` turns options into specs and checks all that can be checked before the first training; `run_here` runs them,
leaves out what is finished already, and goes on after a failure.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evmamba.errors import UserError, unknown_name
from evmamba.launch.progress import RunProgress
from evmamba.launch.recipes import CONF
from evmamba.launch.results import FILE_NAME, Result, check_writable, config_hash, git_state, read_result, write_result
from evmamba.launch.run import SPEC_FILE, RunSpec, failed_result

TASKS = ("classification", "detection", "segmentation")
DETECTORS = ("retinanet", "maskrcnn", "fasterrcnn")
PRESETS = ("tiny", "small", "paper")
LOG_FILE = "run.log"
RUNS_FOLDER = "runs"
TIMING = {"warmup_steps": 10, "timed_steps": 40}
THROUGHPUT_BATCH = {"cpu": 4, "cuda": 64}
POLL_SECONDS = 0.2


@dataclass
class BenchOptions:
    """What `evmamba bench` can be told.

    Attributes:
        output: folder of the report and of the runs.
        backbones: names, in the order of the table's rows.
        tasks: which tasks; None: those with a data folder, or all on embedded data if there is none.
        data: task -> data folder; embedded data for the others.
        detectors: which detectors.
        preset: recipe of a run; None: small for a task with a data folder, tiny for embedded data.
        seed: of everything.
        device: "auto", "cpu" or "cuda".
        precision: Lightning's name; None: bf16-mixed on a GPU that has it, elsewhere the recipe's.
        overrides: ``option=value`` of LightningCLI for every training, ``task.option=value`` for one task's;
            ``cost.batch_size``, ``cost.warmup_steps`` and ``cost.timed_steps`` for the measurement of the cost.
        force: also repeat finished runs.
        elsewhere: plan for a cluster: the device need not be here, and not every file is looked at.
    """

    output: Path = Path("bench")
    backbones: Sequence[str] = ("efficientvmamba_t",)
    tasks: Sequence[str] | None = None
    data: dict[str, str] = field(default_factory=dict)
    detectors: Sequence[str] = ("retinanet",)
    preset: str | None = None
    seed: int = 0
    device: str = "auto"
    precision: str | None = None
    overrides: Sequence[str] = ()
    force: bool = False
    elsewhere: bool = False


def plan(options: BenchOptions) -> list[RunSpec]:
    """Turn options into runs: for every backbone its cost, then its tasks.

    Raises:
        UserError: unknown names (the nearest are offered), wrong options, data that the data modules refuse, a device
            that is not there, an output that cannot be written.
    """
    for kind, names, valid in (
        ("task", options.tasks or (), TASKS),
        ("detector", options.detectors, DETECTORS),
        ("preset", [options.preset] if options.preset else [], PRESETS),
    ):
        for name in names:
            if name not in valid:
                raise unknown_name(kind, name, valid)
    if not options.backbones:
        raise UserError("no backbone to run; name one with --backbones")
    check_writable(options.output, "--output")
    tasks = [t for t in TASKS if t in (options.tasks if options.tasks is not None else options.data or TASKS)]
    device = options.device if options.elsewhere else _device(options.device)
    precision = options.precision or _precision(device)
    overrides = _split_overrides(options.overrides)
    timing = _timing(overrides, device)
    fingerprints: dict[str, str] = {}
    checked: set[tuple[str, str | None]] = set()

    specs = []
    for model in dict.fromkeys(options.backbones):
        _check_backbone(model, pyramid=any(task != "classification" for task in tasks))
        bare = RunSpec("cost", model, head=None, seed=options.seed, device=device, precision=precision)
        specs.append(dataclasses.replace(bare, timing=timing))
        for task in tasks:
            for head in dict.fromkeys(options.detectors) if task == "detection" else (_only_head(task),):
                spec = _training_spec(options, task, head, bare, overrides)
                if (task, head) not in checked:
                    # Once a task and head: a large annotation file should not be read for every backbone.
                    fingerprints[task] = _check_training(spec, options.output, options.elsewhere)
                    checked.add((task, head))
                spec.data_fingerprint = fingerprints[task]
                specs.append(spec)
    return specs


def run_here(
    specs: Sequence[RunSpec], output: Path, progress: RunProgress, force: bool = False
) -> tuple[list[Result], bool]:
    """Run specs one after the other and return one result each, and whether Ctrl-C ended it before its time.

    A finished run with the same spec is not repeated. A failed run is a result like any other; runs that need it are
    not started, which is their reason. After Ctrl-C the run at work is stopped, finished ones stay, and what is missing
    is "failed: interrupted" in what is returned (not on disk).
    """
    results: list[Result] = []
    failed: dict[str, Result] = {}
    interrupted = False
    elsewhere: str | None = None
    with _terminated_is_interrupted(), progress:
        for spec in specs:
            folder = output / RUNS_FOLDER / spec.name
            previous = None if force else finished_before(spec, folder)
            if previous is not None:
                progress.skip(spec)
                elsewhere = elsewhere or _other_commit(previous)
                results.append(previous)
                continue
            start = datetime.datetime.now(datetime.UTC)
            if interrupted:
                results.append(failed_result(spec, "interrupted", start))
                continue
            progress.start(spec)
            lacking = next((failed[name] for name in spec.needs if name in failed), None)
            try:
                if lacking is not None:
                    result = failed_result(spec, not_started(lacking), start)
                    spec.write(folder)
                    write_result(result, folder)
                else:
                    result = run_one(spec, folder, functools.partial(progress.update, folder))
            except KeyboardInterrupt:
                interrupted = True
                result = failed_result(spec, "interrupted", start)
            if not result.finished:
                failed[spec.name] = result
            progress.finish(spec, result)
            results.append(result)
        if elsewhere:
            progress.remark(f"finished runs of another commit were taken over ({elsewhere}); --force repeats them")
    return results, interrupted


def not_started(lacking: Result) -> str:
    """The reason of a run that needs a failed one; through a chain of them the first reason stays in sight."""
    reason = lacking.reason or ""
    return reason if reason.startswith("not started: ") else f"not started: needs {lacking.run}, which failed: {reason}"


def finished_before(spec: RunSpec, folder: Path) -> Result | None:
    """The finished result of the same spec, if there is one; a broken file is none."""
    if not (folder / FILE_NAME).exists():
        return None
    try:
        result = read_result(folder / FILE_NAME)
    except UserError:
        return None
    return result if result.finished and result.provenance.get("spec_hash") == spec.hash else None


def _other_commit(result: Result) -> str | None:
    """Which commit a result is of and which this is, where both are known and differ."""
    then, now = result.provenance.get("git_commit"), git_state()["git_commit"]
    return f"{then[:12]}, now {now[:12]}" if then and now and then != now else None


def run_one(spec: RunSpec, folder: Path, while_waiting: Callable[[], None]) -> Result:
    """Run one spec in a process of its own; everything it says goes to ``run.log``.

    Raises:
        KeyboardInterrupt: after the process has been stopped.
    """
    start = datetime.datetime.now(datetime.UTC)
    _make_room(folder)
    spec.write(folder)
    with (folder / LOG_FILE).open("w") as log:
        # A session of its own, so that Ctrl-C reaches this process alone, which then ends the run in order.
        process = subprocess.Popen(
            [sys.executable, "-m", "evmamba.launch.run", str(folder / SPEC_FILE)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                while_waiting()
                time.sleep(POLL_SECONDS)
        except BaseException:
            _stop(process)
            raise
    if (folder / FILE_NAME).exists():
        return read_result(folder / FILE_NAME)
    # Killed from outside, or died before Python could say anything.
    lines = (folder / LOG_FILE).read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    code = process.returncode
    how = f"killed by signal {-code}{' (out of memory?)' if code == -9 else ''}" if code < 0 else f"exit status {code}"
    result = failed_result(spec, f"{how}; last words: {last} (see {folder / LOG_FILE})", start)
    write_result(result, folder)
    return result


def _make_room(folder: Path) -> None:
    """Remove what an earlier run left; an unfinished one with checkpoints goes to ``NAME.failed-N``, as it may be all
    that is left of a long training."""
    try:
        finished = read_result(folder / FILE_NAME).finished
    except UserError:
        finished = False
    if not finished and next(folder.rglob("*.ckpt"), None):
        n = 1
        while (kept := folder.with_name(f"{folder.name}.failed-{n}")).exists():
            n += 1
        folder.rename(kept)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM (a time limit, say) end the benchmark like Ctrl-C, so that the run's process is not left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _only_head(task: str) -> str:
    return {"classification": "linear", "segmentation": "upernet"}[task]


def _split_overrides(texts: Sequence[str]) -> list[tuple[str | None, str, str]]:
    """``[task.]option=value`` as (task, "cost" or None for every training; option; value)."""
    overrides: list[tuple[str | None, str, str]] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write option=value, e.g. --set trainer.max_epochs=3")
        owner, _, rest = name.partition(".")
        overrides.append((owner, rest, value) if owner in ("cost", *TASKS) else (None, name, value))
    return overrides


def _timing(overrides: list[tuple[str | None, str, str]], device: str) -> dict[str, int]:
    timing = TIMING | {"batch_size": THROUGHPUT_BATCH[device]}
    for owner, name, value in overrides:
        if owner == "cost":
            if name not in timing:
                raise unknown_name("option of cost", name, timing)
            if not value.isdecimal() or (int(value) < 1 and name != "warmup_steps"):
                raise UserError(f"--set cost.{name}={value}: write a positive whole number")
            timing[name] = int(value)
    return timing


def _training_spec(
    options: BenchOptions, task: str, head: str, bare: RunSpec, overrides: list[tuple[str | None, str, str]]
) -> RunSpec:
    preset = options.preset or ("small" if task in options.data else "tiny")
    recipe = recipe_of(task, preset, head, bare.model)
    arguments = [f"--model.init_args.backbone={bare.model}", f"--data.init_args.seed={bare.seed}"]
    if task == "detection":
        arguments.append(f"--model.init_args.detector={head}")
    if task in options.data:
        arguments.append(f"--data.init_args.data_dir={Path(options.data[task]).expanduser().resolve()}")
    elif preset != "tiny":
        arguments.append("--data.init_args.data_dir=embedded")
    arguments += [f"--{name}={value}" for owner, name, value in overrides if owner in (None, task)]
    text = recipe.read_text(encoding="utf-8")
    return dataclasses.replace(
        bare, task=task, head=head, recipe=str(recipe), recipe_hash=config_hash(text), arguments=arguments
    )


def recipe_of(task: str, preset: str, head: str, model: str) -> Path:
    """The recipe of a preset: tiny.yaml, small.yaml, or for "paper" the model's own (T's for models without one).

    Raises:
        UserError: the package has no recipe for this head.
    """
    if preset != "paper":
        return CONF / task / f"{preset}.yaml"
    found = sorted((CONF / task).glob("*_efficientvmamba_?.yaml"))
    if task == "detection":
        found = [path for path in found if f"_{head}_" in path.name]
    if not found:
        raise UserError(f"there is no paper recipe for {task} with {head}")
    own = [path for path in found if path.stem.endswith(f"_{model}")]
    like_t = [path for path in found if path.stem.endswith("_efficientvmamba_t")]
    return (own or like_t or found)[0]


def _check_training(spec: RunSpec, output: Path, elsewhere: bool = False) -> str:
    """Build data, model and trainer of a run once, and look at every file, as its own process will.

    For a run `elsewhere` the files are left to `evmamba data check`: a login node is not for that.

    Returns:
        The data's fingerprint.
    """
    from evmamba.launch.train import EvmambaCLI
    from evmamba.tasks.detection import DetectionData

    here = dataclasses.replace(spec, device="cpu") if elsewhere else spec
    cli = EvmambaCLI(here.cli_arguments(output), run=False)
    if isinstance(cli.datamodule, DetectionData) and cli.datamodule.masks is None:
        cli.datamodule.masks = cli.model.wants_masks  # in the run, the data asks the trainer's model
    if not elsewhere:
        cli.datamodule.setup("fit")
    return str(cli.datamodule.description()["fingerprint"])


def _check_backbone(name: str, pyramid: bool) -> None:
    from evmamba.tasks.backbones import build_backbone

    build_backbone(name, features_only=pyramid)


def _device(wanted: str) -> str:
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", wanted, ("auto", "cpu", "cuda"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def _precision(device: str) -> str | None:
    import torch

    # Without a GPU here the runs are planned for a cluster, whose GPUs have bfloat16 unless --precision says otherwise.
    can = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if device == "cuda" and can else None
