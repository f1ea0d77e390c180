"""What a run is: the spec that decides it, which lies in its folder as ``spec.json``.

Equal specs give equal results, so the hash of one tells whether it must be run again. "Equal" is meant up to rounding:
the number of nodes and processes, the strategy, and how a global batch is split among them (`Resources`) are left out
of the hash, so that a benchmark may go on with other resources. The global batch itself, the precision, and the hash of
the training whose weights a run begins with are in it.

A hash is made of what differs from the defaults: a field added here later, or an option added to a model or a data
module, makes no old run another one, as long as its default means what was done before.
"""

import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from msgspec import Struct, structs

from evmamba.errors import UserError
from evmamba.launch.store.result_schema import Provenance
from evmamba.launch.store.results import (
    COST,
    FILE_NAME,
    Result,
    config_hash,
    device_name,
    provenance,
    read_result,
    write_json,
)
from evmamba.tasks import TASKS
from evmamba.tasks.plain_files import read_json

# A benchmark's folder has its runs in one of this name, each run's its spec and its log.
RUNS_FOLDER = "runs"
SPEC_FILE = "spec.json"
LOG_FILE = "run.log"
NOT_STARTED = "not started: needs {}, which failed"

# As what a trained network can be tested beside PyTorch, by onnxruntime: key in results and file names -> in words.
EXPORTED_FORMS = {"onnx": "ONNX", "int8": "INT8"}

# What model, data and trainer are told beyond their defaults: LightningCLI's configuration, e.g.
# {"model": {"class_path": ..., "init_args": {...}}, "data": {...}, "trainer": {"max_epochs": 3}}.
Settings = dict[str, Any]


class Resources(Struct, frozen=True, forbid_unknown_fields=True):
    """On what a run computes. It decides how long a run takes, not what comes out.

    Attributes:
        nodes: number of machines.
        devices: processes per node, one per GPU (or on a CPU, one per share of its cores).
        strategy: Lightning's or ours, by name; None is "auto": plain for one process, DDP for several.
        batch_size: training images per process and step; None leaves it to the settings.
        accumulate: steps whose gradients are added up to one optimizer step; None leaves it to the settings.
    """

    nodes: int = 1
    devices: int = 1
    strategy: str | None = None
    batch_size: int | None = None
    accumulate: int | None = None

    @property
    def processes(self) -> int:
        return self.nodes * self.devices


class Timing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a cost run measures.

    Attributes:
        warmup_steps: before each measurement.
        timed_steps: of each measurement.
        batch_size: images of a step of the throughput.
        training_batch: images of a training step; 0: none is measured.
        max_batch: where the sweep over batches ends, if memory does not end before; 0: no sweep.
        input_sizes: sides in pixels of the sweep over sizes.
    """

    warmup_steps: int = 10
    timed_steps: int = 40
    batch_size: int = 1
    training_batch: int = 0
    max_batch: int = 0
    input_sizes: tuple[int, ...] = ()


class Start(Struct, frozen=True, forbid_unknown_fields=True):
    """The training whose weights (averaged ones if it averages) a run begins with.

    Attributes:
        run: its name; its folder lies beside the run's.
        hash: of its spec.
        family: of its spec, which is the same for all seeds.
    """

    run: str
    hash: str
    family: str

    @classmethod
    def of(cls, training: "TrainingSpec") -> "Start":
        return cls(training.name, training.hash, training.family)

    def folder(self, beside: Path) -> Path:
        """The training's folder, which lies beside that of the run."""
        return beside.parent / self.run


class BaseSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all runs have.

    Attributes:
        model: name of the backbone.
        head: see `Result.head`.
        seed: of everything.
        device: ``"cpu"`` or ``"cuda"``.
        needs: names of runs that must have finished before this one.
        resources: see `Resources`.
        suite: which suite asked for the run first.
    """

    of_no_consequence: ClassVar[tuple[str, ...]] = ("needs", "resources", "suite")
    model: str
    head: str | None = None
    seed: int
    device: str
    needs: tuple[str, ...] = ()
    resources: Resources = Resources()
    suite: str | None = None

    @property
    def hash(self) -> str:
        # Newer code may give other numbers.
        return config_hash(self._decides() | {"evmamba": metadata.version("evmamba")})

    @property
    def family(self) -> str:
        """A hash of what decides the run besides the seed: repetitions of one thing have the same."""
        return config_hash(self._decides(seeds_alike=True))

    @property
    def kind(self) -> str:
        """What the run does, as the first word of its name."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self._named_head, self.model, self.hash[:6]) if part)

    @property
    def _named_head(self) -> str | None:
        return self.head

    def _decides(self, seeds_alike: bool = False) -> dict[str, Any]:
        no_part = {*self.of_no_consequence, *(["seed"] if seeds_alike else [])}
        told = {name: value for name, value in _beyond_defaults(self).items() if name not in no_part}
        return {"kind": self.__struct_config__.tag, **msgspec.to_builtins(told)}

    def write(self, folder: Path) -> None:
        write_json(folder / SPEC_FILE, msgspec.to_builtins(self))


class CostSpec(BaseSpec, frozen=True, kw_only=True, tag="cost"):
    """A measurement of a bare classifier, or with a head of the whole detector or segmentor.

    Attributes:
        precision: Lightning's name, e.g. ``"bf16-mixed"``; None: float32.
        timing: see `Timing`.
        head_options: options of the head as the paper's recipe has them, e.g. the decoder's width.
        together: the networks of a table, by model, each with its `head_options`: they are measured in turns by the run
            of the first; with other networks it is another measurement. Empty: this one alone.
    """

    task: ClassVar[str] = COST
    precision: str | None = None
    timing: Timing = Timing()
    head_options: dict[str, Any] = {}
    together: dict[str, dict[str, Any]] = {}

    @property
    def kind(self) -> str:
        return self.task

    @property
    def leads(self) -> bool:
        """Whether this run measures the others of its table too."""
        return next(iter(self.together), self.model) == self.model

    @property
    def members(self) -> list["CostSpec"]:
        """The runs of its table, this one among them; all but the first need that one."""
        if not self.together:
            return [self]
        first, *others = (
            structs.replace(self, model=model, head_options=options, needs=())
            for model, options in self.together.items()
        )
        return [first, *(structs.replace(other, needs=(first.name,)) for other in others)]


class TaskSpec(BaseSpec, frozen=True, kw_only=True):
    """What trainings and evaluations have.

    Attributes:
        task: its name.
        settings: recipe and options together, see `Settings`.
        recipe: path of the recipe they are from, for people; what it said is in the settings.
        data_fingerprint: of the data set, so that changed data is another run.
        trials: of a search that chose the settings for this network; 0: they are the recipe's.
    """

    of_no_consequence = (*BaseSpec.of_no_consequence, "recipe", "own_batch")
    task: str
    settings: Settings
    recipe: str | None = None
    data_fingerprint: str | None = None
    trials: int = 0

    @property
    def precision(self) -> str | None:
        """Lightning's name; None: float32."""
        return (self.settings.get("trainer") or {}).get("precision")

    @property
    def _named_head(self) -> str | None:
        return self.head if len(TASKS[self.task].heads) > 1 else None

    def _decides(self, seeds_alike: bool = False) -> dict[str, Any]:
        decides = super()._decides(seeds_alike)
        if "start" in decides:
            decides["start"] = decides["start"]["family" if seeds_alike else "hash"]
        if seeds_alike:
            decides["settings"].get("data", {}).get("init_args", {}).pop("seed", None)
        return decides


class TrainingSpec(TaskSpec, frozen=True, kw_only=True, tag="training"):
    """A training, with the test of the weights that it ends with.

    Attributes:
        start: the training whose backbone it begins with; None: at random, or as the settings say.
        test: whether to test; without, an `EvaluationSpec` may.
        test_scales: a classifier is tested also on images of these multiples of its training size.
        own_batch: the batch of the settings was asked for as it is, per process: processes do not share it.
        global_batch: training images per optimizer step over all processes; None: the settings' batch, one process.
        loggers: which of `evmamba.launch.fit.loggers` log the training, besides the log of its own.
    """

    of_no_consequence = (*TaskSpec.of_no_consequence, "loggers")
    start: Start | None = None
    test: bool = True
    test_scales: tuple[float, ...] = ()
    own_batch: bool = False
    global_batch: int | None = None
    loggers: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.task if self.test else f"{self.task}_training"

    def after(self, training: "TrainingSpec") -> "TrainingSpec":
        """This training, beginning with the backbone of another, which must have finished before."""
        return structs.replace(self, start=Start.of(training), needs=(*self.needs, training.name))


class EvaluationSpec(TaskSpec, frozen=True, kw_only=True, tag="evaluation"):
    """A test of the weights that a training ended with, under options of its own (multi-scale, say).

    Attributes:
        start: the training.
        exported: whether the network is also tested as ONNX files, in all `EXPORTED_FORMS`.
    """

    start: Start
    exported: bool = False

    @property
    def kind(self) -> str:
        return f"{self.task}_evaluation"


Spec = CostSpec | TrainingSpec | EvaluationSpec


def read_spec(path: Path) -> Spec:
    """Read a ``spec.json``.

    Raises:
        UserError: the file is missing, no JSON, or no spec of this version of evmamba; the message names it.
    """
    document = read_json(path)
    try:
        spec: Spec = msgspec.convert(document, Spec)
        spec.name  # noqa: B018 (or there is no such task)
        return spec
    except (msgspec.ValidationError, UserError) as error:
        raise UserError(
            f"{path}: no spec of this version of evmamba ({error}); repeat its run, or use another --output"
        ) from error


def finished_before(spec: Spec, folder: Path) -> Result | None:
    """The finished result of the same spec, if there is one; a broken file is none."""
    result = result_before(spec, folder)
    return result if result is not None and result.finished else None


def result_before(spec: Spec, folder: Path) -> Result | None:
    """The result of the same spec, finished or not, if there is one; a broken file is none."""
    if not (folder / FILE_NAME).exists():
        return None
    try:
        result = read_result(folder / FILE_NAME)
    except UserError:
        return None
    return result if result.provenance.get("spec_hash") == spec.hash else None


def why_not_started(needed: str, reason: str, blocked_by: str | None) -> tuple[str, str]:
    """What to say of a run that needs a failed one, of which run, reason and `Result.blocked_by` are given.

    Returns:
        `Result.blocked_by` and the reason; through a chain of such runs the first failure stays in sight.
    """
    if blocked_by is not None:
        return blocked_by, reason
    return needed, f"{NOT_STARTED.format(needed)}: {reason}"


def failed_result(spec: Spec, reason: str, start: datetime.datetime, blocked_by: str | None = None) -> Result:
    """The result of a run that did not get to its end, with the reason as one line."""
    origin = provenance(
        config=msgspec.to_builtins(spec),
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
        provenance=origin | origin_of(spec),
        suite=spec.suite,
    )


def reason_of(error: Exception) -> str:
    """Why a run failed, as one line."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + first[0] if first else ''}"


def origin_of(spec: Spec) -> Provenance:
    """What a result's provenance says about its spec."""
    origin = Provenance(spec_hash=spec.hash)
    if isinstance(spec, CostSpec):
        return origin
    if spec.trials:
        origin["trials"] = spec.trials
    if spec.settings.get("data", {}).get("init_args", {}).get("held_out"):
        origin["trial"] = True
    if spec.start:
        origin |= Provenance(init_from=spec.start.run, init_family=spec.start.family)
    return origin


def _beyond_defaults(record: Struct) -> dict[str, Any]:
    """The fields of a record, and of records in it, that differ from their defaults."""
    fields = {f.name: value for f in structs.fields(record) if (value := getattr(record, f.name)) != f.default}
    return {name: _beyond_defaults(value) if isinstance(value, Struct) else value for name, value in fields.items()}
