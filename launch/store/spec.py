"""What a run is: the spec that decides it, which lies in its folder as ``spec.json``."""

import dataclasses
import datetime
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from evmamba.launch.store.results import COST, Result, config_hash, device_name, provenance, write_json
from evmamba.tasks import TASKS

# A benchmark's folder has its runs in one of this name, each run's its spec and its log.
RUNS_FOLDER = "runs"
SPEC_FILE = "spec.json"
LOG_FILE = "run.log"
STAGES = ("fit_test", "fit", "test")
NOT_STARTED = "not started: needs {}, which failed"
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
        several = self.task == COST or len(TASKS[self.task].heads) > 1
        parts = [kind, self.head if several else None, self.model, self.hash[:6]]
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

    @property
    def starts_trained(self) -> bool:
        """Whether a training starts from the backbone of another run."""
        return self.init_from is not None and self.stage != "test"

    def start_folder(self, folder: Path) -> Path:
        """The folder of the run that this one, in `folder`, starts from."""
        assert self.init_from is not None
        return folder.parent / self.init_from


def why_not_started(needed: str, reason: str, blocked_by: str | None) -> tuple[str, str]:
    """What to say of a run that needs a failed one, of which run, reason and `Result.blocked_by` are given.

    Returns:
        `Result.blocked_by` and the reason; through a chain of such runs the first failure stays in sight.
    """
    if blocked_by is not None:
        return blocked_by, reason
    return needed, f"{NOT_STARTED.format(needed)}: {reason}"


def failed_result(spec: RunSpec, reason: str, start: datetime.datetime, blocked_by: str | None = None) -> Result:
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
        blocked_by=blocked_by,
        provenance=origin | {"spec_hash": spec.hash},
        suite=spec.suite,
    )


def origin_of(spec: RunSpec) -> dict[str, Any]:
    """What a result's provenance says about its spec."""
    start = {"init_from": spec.init_from, "init_family": spec.init_family} if spec.init_from else {}
    return {"spec_hash": spec.hash, **start}
