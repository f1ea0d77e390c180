"""One run: ``python -m evmamba.launch.bench.run FOLDER/spec.json``, alone, or as one of many processes.

Fits and tests what the spec names, or measures the cost of a bare backbone, and leaves ``result.json`` beside the spec,
also when it fails. Exit status: 0 finished, 1 failed, 75 stopped by a signal: started again, it continues. While it
works, ``progress.json`` says how far it is. Of several processes the first writes all this; a failure is told by the
process that failed first.
"""

import dataclasses
import datetime
import json
import os
import sys
import traceback
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.launch.fit.failures import told_once
from evmamba.launch.fit.launchers import node_name, process_rank
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings
from evmamba.launch.store.results import Result, config_hash, device_name, provenance, write_json, write_result

SPEC_FILE = "spec.json"
# Where a classification leaves its network for others to start from (see weights.py).
BACKBONE_FILE = "backbone.safetensors"
STAGES = ("fit_test", "fit", "test")
SEED_OPTION = "data.init_args.seed"


@dataclass
class Resources:
    """On what a run computes. It decides how long a run takes, not what comes out: it is no part of the spec's hash.

    Attributes:
        nodes: number of machines.
        devices: processes per node, one per GPU (or on a CPU, one per share of its cores).
        strategy: Lightning's or ours, by name; None is "auto": plain for one process, DDP for several.
        batch_size: training images per process and step; None leaves it to the recipe.
        accumulate: steps whose gradients are added up to one optimizer step; None leaves it to the recipe.
    """

    nodes: int = 1
    devices: int = 1
    strategy: str | None = None
    batch_size: int | None = None
    accumulate: int | None = None

    @property
    def processes(self) -> int:
        return self.nodes * self.devices

    def cli_arguments(self) -> list[str]:
        """LightningCLI's options."""
        arguments = [f"--trainer.num_nodes={self.nodes}", f"--trainer.devices={self.devices}"]
        for option, value in (
            ("trainer.strategy", self.strategy),
            ("data.init_args.batch_size", self.batch_size),
            ("trainer.accumulate_grad_batches", self.accumulate),
        ):
            if value is not None:
                arguments.append(f"--{option}={value}")
        return arguments


@dataclass
class RunSpec:
    """What decides one run; equal specs give equal results, so the hash of one tells whether it must be run again.

    "Equal" is meant up to rounding: the number of nodes and processes, the strategy, and how a global batch is split
    among them (`resources`) are left out of the hash, so that a benchmark may go on with other resources. The global
    batch itself, the precision, and the hash of the training whose weights a run starts from are in it.

    Attributes:
        task: ``"cost"`` or a task.
        model: name of the backbone.
        head: see `Result.head`.
        recipe: path of the recipe; None for a cost run.
        recipe_hash: hash of the recipe's text, so that an edited recipe is another run.
        arguments: LightningCLI options on top of the recipe.
        seed: of everything.
        device: ``"cpu"`` or ``"cuda"``.
        precision: Lightning's name, e.g. ``"32-true"`` or ``"bf16-mixed"``; None leaves it to the recipe.
        timing: what a cost run measures, see `launch.measure.cost.measure_cost`.
        data_fingerprint: of the data set, so that changed data is another run.
        stage: "fit_test" trains, then tests; "fit" only trains; "test" tests the weights of the run `init_from`.
        init_from: name of the run whose weights (averaged ones if it averages) the backbone starts from, or which a
            "test" evaluates; its folder lies beside this run's.
        init_hash: that run's hash, so that another start is another run.
        init_family: that run's `family`, which is the same for all seeds.
        needs: names of runs that must have finished before this one; `init_from` is among them.
        global_batch: training images per optimizer step over all processes; None: the recipe's batch, one process.
        resources: see `Resources`.
        test_scales: a classifier is tested also on images of these multiples of its training size.
        suite: which suite asked for the run first; of no consequence for it.
    """

    task: str
    model: str
    head: str | None
    seed: int
    device: str
    precision: str | None
    recipe: str | None = None
    recipe_hash: str | None = None
    arguments: list[str] = dataclasses.field(default_factory=list)
    timing: dict[str, Any] = dataclasses.field(default_factory=dict)
    data_fingerprint: str | None = None
    stage: str = "fit_test"
    init_from: str | None = None
    init_hash: str | None = None
    init_family: str | None = None
    needs: list[str] = dataclasses.field(default_factory=list)
    global_batch: int | None = None
    resources: Resources = dataclasses.field(default_factory=Resources)
    test_scales: list[float] = dataclasses.field(default_factory=list)
    suite: str | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage is '{self.stage}', not one of {', '.join(STAGES)}")

    @property
    def hash(self) -> str:
        # Where the recipe lies does not matter, what it says does; so does the version, which newer code may change.
        # Names of other runs are stood for by init_hash.
        return config_hash(self._decides("init_family") | {"evmamba": metadata.version("evmamba")})

    @property
    def family(self) -> str:
        """A hash of what decides the run besides the seed: repetitions of one thing have the same."""
        arguments = [argument for argument in self.arguments if not argument.startswith(f"--{SEED_OPTION}=")]
        return config_hash(self._decides("seed", "init_hash") | {"arguments": arguments})

    def _decides(self, *besides: str) -> dict[str, Any]:
        left_out = ("recipe", "init_from", "needs", "resources", "suite", *besides)
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}

    @property
    def name(self) -> str:
        kind = {"fit": f"{self.task}_training", "test": f"{self.task}_evaluation"}.get(self.stage, self.task)
        parts = [kind, self.head if self.task in ("detection", "cost") else None, self.model, self.hash[:6]]
        return "-".join(part for part in parts if part)

    def write(self, folder: Path) -> None:
        write_json(folder / SPEC_FILE, dataclasses.asdict(self))

    @staticmethod
    def read(path: Path) -> "RunSpec":
        document = json.loads(path.read_text(encoding="utf-8"))
        return RunSpec(**document | {"resources": Resources(**document.get("resources", {}))})

    def start_after(self, other: "RunSpec") -> None:
        """Start from the weights of another run (for a "test": evaluate them), which must have finished before."""
        self.init_from, self.init_hash, self.init_family = other.name, other.hash, other.family
        self.needs = [*self.needs, other.name]

    def cli_arguments(self, folder: Path) -> list[str]:
        """LightningCLI's options for this run, with everything it writes under `folder`."""
        return [
            f"--config={self.recipe}",
            f"--seed_everything={self.seed}",
            f"--trainer.accelerator={self.device}",
            *self.resources.cli_arguments(),
            *([f"--trainer.precision={self.precision}"] if self.precision else []),
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger=evmamba.tasks.training.metrics_log.MetricsLog",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *(
                [f"--model.init_args.checkpoint={self.start_folder(folder) / BACKBONE_FILE}"]
                if self.starts_trained
                else []
            ),
            *self.arguments,
        ]

    @property
    def starts_trained(self) -> bool:
        """Whether a training starts from the backbone of another run."""
        return self.init_from is not None and self.stage != "test"

    def start_folder(self, folder: Path) -> Path:
        """The folder of the run that this one, in `folder`, starts from."""
        assert self.init_from is not None
        return folder.parent / self.init_from


def failed_result(spec: RunSpec, reason: str, start: datetime.datetime) -> Result:
    """The result of a run that did not get to its end, with the reason as one line."""
    origin = provenance(
        config=dataclasses.asdict(spec),
        seed=spec.seed,
        device=device_name(spec.device),
        precision=spec.precision or "",
        start=start,
    )
    return Result(
        run=spec.name,
        task=spec.task,
        model=spec.model,
        head=spec.head,
        status="failed",
        reason=" ".join(reason.split()),
        provenance=origin | {"spec_hash": spec.hash},
        suite=spec.suite,
    )


def run(spec: RunSpec, folder: Path) -> None:
    """Run a spec and write its result.

    Raises:
        UserError, or whatever went wrong; no result is written then (`main` does).
    """
    if spec.task == "cost":
        measure_cost(spec, folder)
    elif spec.stage == "test":
        evaluate(spec, folder)
    else:
        fit_and_test(spec, folder)


def fit_and_test(spec: RunSpec, folder: Path) -> None:
    """Train as the recipe says, then test the weights that the training ends with (averaged ones if it averages).

    A training that was interrupted in this folder is continued.

    Leaves those weights in the folder. A "fit" stops there; its result has no metrics.
    """
    from evmamba.launch.fit.record import ProgressWriter, ResultWriter, TrainingRecord, add_callbacks, weights_in_memory
    from evmamba.launch.fit.resume import ignore_warning
    from evmamba.launch.fit.strategies import whole_parameters
    from evmamba.launch.fit.weights import save_weights
    from evmamba.launch.train import EvmambaCLI

    _say_progress(folder, "preparing")
    cli = EvmambaCLI(spec.cli_arguments(folder), run=False)
    record = TrainingRecord()
    writer = ResultWriter(folder, cli.plain_config(), spec.name, weights_in_memory(cli.trainer), origin_of(spec))
    writer.suite = spec.suite
    add_callbacks(cli.trainer, record, ProgressWriter(folder, record))
    # Also a training that is finished: its last validation is repeated, and the module holds its weights again.
    found = cli.continuation()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=found.checkpoint and str(found.checkpoint))
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    if found.finished:
        ignore_warning()  # the test is all that this start has to do
    writer.training = record.summary(cli.trainer)
    with whole_parameters(cli.trainer):
        if cli.trainer.is_global_zero:
            save_weights(cli.model, folder)
            if spec.stage == "fit":
                trained = writer.result(cli.trainer, cli.model, cli.datamodule)
                trained.metrics, trained.details = {}, {}
                trained.protocol["stage"] = "fit"
                write_result(trained, folder)
    if spec.stage == "fit":
        return
    if spec.test_scales:
        from evmamba.launch.fit.scales import accuracy_at_scales

        points = accuracy_at_scales(cli.trainer, cli.model, cli.datamodule, spec.test_scales)
        writer.sweeps = {"input_size": points}
    add_callbacks(cli.trainer, writer)
    cli.model.output_dir = folder
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def evaluate(spec: RunSpec, folder: Path) -> None:
    """Test the weights that the run `init_from` ended with, under this run's own options (multi-scale, say)."""
    from evmamba.launch.fit.record import ProgressWriter, ResultWriter, TrainingRecord, add_callbacks
    from evmamba.launch.fit.weights import load_weights
    from evmamba.launch.store.results import FILE_NAME, began_at_random, read_result
    from evmamba.launch.train import EvmambaCLI

    trained_folder = spec.start_folder(folder)
    _say_progress(folder, "preparing")
    cli = EvmambaCLI(spec.cli_arguments(folder), run=False)
    load_weights(cli.model, trained_folder)
    trained = read_result(trained_folder / FILE_NAME)
    weights = f"{trained.protocol.get('weights', 'last epoch')} of {trained.run}"
    origin = origin_of(spec) | {"from_scratch": began_at_random(trained)}
    writer = ResultWriter(folder, cli.plain_config(), spec.name, weights, origin)
    writer.suite = spec.suite
    writer.training = trained.training
    add_callbacks(cli.trainer, ProgressWriter(folder, TrainingRecord()), writer)
    cli.model.output_dir = folder
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def origin_of(spec: RunSpec) -> dict[str, Any]:
    """What a result's provenance says about its spec."""
    start = {"init_from": spec.init_from, "init_family": spec.init_family} if spec.init_from else {}
    return {"spec_hash": spec.hash, **start}


def measure_cost(spec: RunSpec, folder: Path) -> None:
    """See `launch.measure.cost`."""
    from evmamba.launch.measure import cost as measure

    _say_progress(folder, "measuring")
    measure.measure_cost(spec, folder)


def attempt() -> str | None:
    """What tells one start of a run's processes from the next: SLURM's job and its number of restarts, or torchrun's;
    None where one process is all there is."""
    for job, restarts in (
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    ):
        if name := os.environ.get(job):
            return f"{name}.{os.environ.get(restarts, '0')}"
    return None


def _say_progress(folder: Path, phase: str) -> None:
    from evmamba.launch.fit.record import write_progress

    if process_rank() == 0:
        write_progress(folder, phase)


def _first_to_fail(folder: Path) -> bool:
    """Whether no other process of this start has failed yet: the ones after it only tell that they lost it."""
    name = attempt()
    if name is None:
        return True
    try:
        (folder / f".failed-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    arguments: list[Any] = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m evmamba.launch.bench.run FOLDER/spec.json", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    spec, folder = RunSpec.read(path), path.parent
    start = datetime.datetime.now(datetime.UTC)
    quiet_warnings()
    quiet_logs()
    from evmamba.launch.fit.resume import ignore_warning, leave_on_warning

    if spec.task == "cost" or spec.stage == "test":
        ignore_warning()
    else:
        leave_on_warning()
    who = f"process {process_rank()} on {node_name()}" if spec.resources.processes > 1 else ""
    try:
        with told_once():
            run(spec, folder)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        reason = " ".join(str(error).split())
    except Exception as error:
        # The log keeps the whole story, the table its first line.
        print(f"{who} failed:\n{traceback.format_exc()}" if who else traceback.format_exc(), file=sys.stderr, end="")
        first = str(error).strip().splitlines()
        where = f"{who}, " if who else ""
        reason = f"{type(error).__name__}{': ' + first[0] if first else ''} ({where}see {folder / 'run.log'})"
    else:
        return 0
    print(f"failed: {reason}", file=sys.stderr, flush=True)
    if _first_to_fail(folder):
        write_result(failed_result(spec, reason, start), folder)
    return 1


if __name__ == "__main__":
    sys.exit(main())
