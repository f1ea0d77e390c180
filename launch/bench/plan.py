"""Which runs make a benchmark: options become specs, and all that can be checked is, before the first training."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec import structs

from evmamba.errors import UserError, unknown_name
from evmamba.launch.bench.graph import ACCUMULATE_OPTION, BATCH_OPTION, CHECKPOINT_OPTION, DROP_PATH_OPTION
from evmamba.launch.bench.suites import SUITES, Entry, Suite, entries_of
from evmamba.launch.fit.loggers import check_logger
from evmamba.launch.fit.recipes import has_drop_path, recipe_of
from evmamba.launch.store.devices import DEVICES, choose_device
from evmamba.launch.store.precision import autocast_to
from evmamba.launch.store.results import check_writable
from evmamba.launch.store.spec import CostSpec, Settings, Spec, Timing, TrainingSpec
from evmamba.tasks import TASKS, Task

PRESETS = ("tiny", "small", "finetune", "paper")
# Images of a timed step, of a timed training step, and the largest batch that a suite's sweep tries.
TIMINGS = {
    "cpu": Timing(batch_size=4, training_batch=4, max_batch=8),
    "cuda": Timing(batch_size=64, training_batch=64, max_batch=4096),
}
MAY_BE_ZERO = ("warmup_steps", "training_batch", "max_batch")
DEFAULT_BACKBONE = "efficientvmamba_t"
BACKBONE_OPTION = "model.init_args.backbone"
SEED_OPTION = "data.init_args.seed"
PRECISION_OPTION = "trainer.precision"
# Of which task (None: of every training, "cost": of the measurement of the cost), its name, what was written.
Override = tuple[str | None, str, str]


@dataclass
class BenchOptions:
    """What `evmamba bench` can be told.

    Attributes:
        output: folder of the report and of the runs.
        suite: name of a suite (`evmamba.launch.bench.suites`), which then says what is not given here.
        backbones: names, in the order of the table's rows; None: the suite's, or EfficientVMamba-T.
        tasks: which tasks; None: those with a data folder, or the suite's or all on embedded data if there is none.
        data: task -> data folder; embedded data for the others.
        heads: task -> which heads; of a task that is not there its default head, or those of the suite.
        preset: recipe of a run, one of `PRESETS`; None: small (suite paper: paper) for a task with a data folder, tiny
            for embedded data.
        seeds: of everything; every training is repeated with each, the cost is measured once.
        device: "auto", "cpu" or "cuda".
        precision: Lightning's name; None: bf16-mixed on a GPU that has it, elsewhere the recipe's.
        pretrained: trainings start from the weights published under the backbone's name, where `overrides` name none.
        overrides: ``option=value`` of LightningCLI for every training, ``task.option=value`` for one task's;
            ``cost.OPTION`` for the measurement of the cost: batch_size, training_batch, max_batch, input_sizes,
            warmup_steps, timed_steps (see `evmamba.launch.measure.cost`).
        search: trials of each network before the benchmark (see `evmamba.launch.bench.search`); 0: no search.
        exported: test trained networks as ONNX files too (`evmamba.launch.bench.graph.with_exported`).
        loggers: others' loggers of the trainings, see `evmamba.launch.fit.loggers`.
        force: also repeat finished runs.
        chained: the runs become a graph (`evmamba.launch.bench.graph.build_graph`), in which a task starts from another
            one's trained backbone.
        elsewhere: plan for a cluster: the device need not be here, and not every file is looked at.
    """

    output: Path = Path("bench")
    suite: str | None = None
    backbones: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    data: dict[str, str] = field(default_factory=dict)
    heads: Mapping[str, Sequence[str]] = field(default_factory=dict)
    preset: str | None = None
    seeds: Sequence[int] = (0,)
    device: str = "auto"
    precision: str | None = None
    pretrained: bool = False
    overrides: Sequence[str] = ()
    loggers: Sequence[str] = ()
    search: int = 0
    exported: bool = False
    force: bool = False
    chained: bool = False
    elsewhere: bool = False


def plan(options: BenchOptions) -> list[Spec]:
    """Turn options into runs: with the first seed every backbone's cost, then its tasks; then the other seeds' tasks.

    With a search these are its trials, until all have ended; then trials, benchmark, and what the trials chose.

    Raises:
        UserError: unknown names (the nearest are offered), wrong options, data that the data modules refuse, a device
            that is not there, an output that cannot be written.
    """
    named: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("suite", [options.suite] if options.suite else [], tuple(SUITES)),
        ("task", options.tasks or (), list(TASKS)),
        *((TASKS[task].head_option or "head", keys, heads_of(task)) for task, keys in options.heads.items()),
        ("preset", [options.preset] if options.preset else [], PRESETS),
        ("device", [options.device], DEVICES),
    ]
    for kind, names, valid in named:
        for name in names:
            if name not in valid:
                raise unknown_name(kind, name, valid)
    suite = SUITES[options.suite] if options.suite else None
    models = backbones_of(options)
    if not models:
        raise UserError("no backbone to run; name one with --backbones")
    if not options.seeds:
        raise UserError("no seed to run with; give one with --seeds")
    for logger in options.loggers:
        check_logger(logger)
    check_writable(options.output, "--output")
    usual = (suite and suite.tasks) or [task.name for task in TASKS.values() if task.embedded]
    wanted = options.tasks if options.tasks is not None else options.data or usual
    tasks = [task for task in TASKS if task in wanted]
    entries = entries_of(suite, models, tasks, options.heads)
    device = options.device if options.elsewhere else choose_device(options.device)
    precision = options.precision or _precision(device)
    autocast_to(precision)  # before anything is read
    overrides = _split_overrides(options.overrides)
    timing = _timing(overrides, device, suite)
    _check_start(options, tasks, overrides)
    _check_search(options, tasks)
    fingerprints: dict[str, str] = {}
    checked: set[tuple[str, str | None]] = set()
    for model in models:
        _check_backbone(model, any(TASKS[e.task].pyramid for e in entries if e.model == model), options.pretrained)

    costs: list[CostSpec] = []
    for model in models:
        heads = dict.fromkeys(
            e.head for e in entries if e.model == model and suite and suite.whole and TASKS[e.task].whole
        )
        bare = CostSpec(
            model=model,
            seed=options.seeds[0],
            device=device,
            precision=precision,
            suite=options.suite,
            timing=timing,
        )
        costs += [bare, *(_whole_spec(bare, head, options) for head in heads)]
    measured = in_turns(costs)
    specs: dict[str, Spec] = {}  # by name: without the paper's recipes its schedules are one run
    for seed in dict.fromkeys(options.seeds):
        for model in models:
            if seed == options.seeds[0]:
                specs |= {cost.name: cost for cost in measured if cost.model == model}
            for entry in (entry for entry in entries if entry.model == model):
                spec = _training_spec(options, entry, seed, device, precision, overrides, suite)
                if (entry.task, entry.head) not in checked:
                    # Once a task and head: a large annotation file should not be read for every backbone.
                    fingerprints[entry.task] = _check_training(spec, options.output, options.elsewhere)
                    checked.add((entry.task, entry.head))
                spec = structs.replace(spec, data_fingerprint=fingerprints[entry.task])
                specs[spec.name] = spec
    if not options.search:
        return list(specs.values())
    from evmamba.launch.bench.search import searched

    return searched(specs.values(), options.search, options.output)


def _check_search(options: BenchOptions, tasks: Sequence[str]) -> None:
    """Trials begin with random weights, and so must what they choose for.

    Raises:
        UserError: some would begin with the weights of a training of this benchmark.
    """
    if not options.search:
        return
    for task in tasks:
        if preset_of(options, task) == "paper":
            raise UserError(
                f"--search is for recipes that begin with random weights; {task} has the paper's: use another --preset"
            )
        if options.chained and TASKS[task].starts_from in tasks:
            raise UserError(
                f"--search: {task} would start from the trained {TASKS[task].starts_from}, its trials would not; "
                "submit one of them at a time with --tasks"
            )


def in_turns(costs: Sequence[CostSpec]) -> list[CostSpec]:
    """The same measurements, those of one kind in turns with each other; each kind's first comes first."""
    kinds: dict[str | None, dict[str, CostSpec]] = {}
    for cost in costs:
        kinds.setdefault(cost.head, {})[cost.model] = cost
    return [
        member
        for kind in kinds.values()
        for first in [next(iter(kind.values()))]
        for member in structs.replace(
            first, together={model: cost.head_options for model, cost in kind.items()} if len(kind) > 1 else {}
        ).members
    ]


def backbones_of(options: BenchOptions) -> list[str]:
    """The backbones of a benchmark, each once, in the order of the table's rows."""
    if options.backbones is not None:
        return list(dict.fromkeys(options.backbones))
    return list(SUITES[options.suite].models) if options.suite else [DEFAULT_BACKBONE]


def heads_of(task: str) -> list[str]:
    return [head.key for head in TASKS[task].heads]


def preset_of(options: BenchOptions, task: str) -> str:
    """Which recipes a task's trainings have."""
    if options.preset:
        return options.preset
    if task not in options.data:
        return "tiny"
    return SUITES[options.suite].preset if options.suite else "small"


def _split_overrides(texts: Sequence[str]) -> list[Override]:
    """``[task.]option=value`` as (task, "cost" or None for every training; option; value)."""
    overrides: list[Override] = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write option=value, e.g. --set trainer.max_epochs=3")
        owner, _, rest = name.partition(".")
        overrides.append((owner, rest, value) if owner in ("cost", *TASKS) else (None, name, value))
    return overrides


def _check_start(options: BenchOptions, tasks: Sequence[str], overrides: list[Override]) -> None:
    """The paper's detectors and segmentors start from its classifiers: without those somebody has to say from what.

    Raises:
        UserError: nobody does.
    """
    for task in tasks:
        start = TASKS[task].starts_from
        if start is None or (start in tasks and preset_of(options, start) == "paper"):
            continue
        told = options.pretrained or any(
            owner in (None, task) and name == CHECKPOINT_OPTION for owner, name, _ in overrides
        )
        if preset_of(options, task) == "paper" and not told:
            raise UserError(
                f"the paper's {task} starts from its {start}: add --{start} FOLDER with that one's data, or "
                f"--pretrained, or give weights with --set {task}.{CHECKPOINT_OPTION}=FILE (null: random ones)"
            )


def _timing(overrides: list[Override], device: str, suite: Suite | None) -> Timing:
    sweeps = {"input_sizes": suite.input_sizes} if suite else {"max_batch": 0}
    timing = structs.replace(TIMINGS[device], **sweeps)
    options = structs.asdict(timing)
    for owner, name, value in overrides:
        if owner == "cost":
            if name not in options:
                raise unknown_name("option of cost", name, options)
            numbers = value.split(",") if name == "input_sizes" else [value]
            least = 0 if name in MAY_BE_ZERO else 1
            if not all(number.isdecimal() and int(number) >= least for number in numbers):
                raise UserError(f"--set cost.{name}={value}: write a positive whole number")
            number = tuple(map(int, numbers)) if name == "input_sizes" else int(value)
            timing = structs.replace(timing, **{name: number})
    return timing


def _equal(options: BenchOptions, task: Task) -> Mapping[str, Any]:
    """Arguments of a task's module that all networks share, beyond their recipes."""
    suite = SUITES[options.suite] if options.suite else None
    return task.equal if suite and suite.equal and preset_of(options, task.name) == "paper" else {}


def _whole_spec(bare: CostSpec, head: str, options: BenchOptions) -> CostSpec:
    """The cost of a backbone with its head, UPerNet as wide as in the paper's recipe, or as wide for all."""
    from evmamba.launch.fit.settings import setting

    task = TASKS.of_head(head)
    head_options = {}
    if task.whole_options:
        recipe = _settings(recipe_of(task.name, "paper", head, bare.model), ())
        head_options = {name: setting(recipe, f"model.init_args.{name}") for name in task.whole_options}
    return structs.replace(bare, head=head, timing=Timing(), head_options=head_options | dict(_equal(options, task)))


def _training_spec(
    options: BenchOptions,
    entry: Entry,
    seed: int,
    device: str,
    precision: str | None,
    overrides: list[Override],
    suite: Suite | None,
) -> TrainingSpec:
    from evmamba.launch.fit.settings import changed, setting
    from evmamba.tasks.backbones import PRETRAINED

    task, record = entry.task, TASKS[entry.task]
    preset = preset_of(options, task)
    recipe = recipe_of(task, preset, entry.head, entry.model, entry.schedule)
    told: list[tuple[str, Any]] = []
    if record.head_option:
        told.append((f"model.init_args.{record.head_option}", entry.head))
    if suite and suite.multi_scale:
        told += [(f"model.init_args.{name}", value) for name, value in record.thorough.items()]
    told += [(f"model.init_args.{name}", value) for name, value in _equal(options, record).items()]
    if precision is not None:
        told.append((PRECISION_OPTION, precision))
    if task in options.data:
        told.append(("data.init_args.data_dir", str(Path(options.data[task]).expanduser().resolve())))
    elif preset != "tiny":
        told.append(("data.init_args.data_dir", "embedded"))
    given = [(name, value) for owner, name, value in overrides if owner in (None, task)]
    names = {name for name, _ in given}
    settings = _settings(recipe, (*told, *given))
    own: dict[str, Any] = {BACKBONE_OPTION: entry.model, SEED_OPTION: seed}
    if options.pretrained:
        own[CHECKPOINT_OPTION] = PRETRAINED
    if setting(settings, DROP_PATH_OPTION) and not has_drop_path(entry.model):
        own[DROP_PATH_OPTION] = 0.0
    for name, value in own.items():
        if name not in names:
            settings = changed(settings, name, value)
    return TrainingSpec(
        task=task,
        model=entry.model,
        head=entry.head,
        seed=seed,
        device=device,
        suite=options.suite,
        recipe=str(recipe),
        settings=settings,
        loggers=tuple(dict.fromkeys(options.loggers)),
        own_batch=not names.isdisjoint((BATCH_OPTION, ACCUMULATE_OPTION)),
        test_scales=suite.test_scales if suite and record.scalable else (),
    )


@functools.cache
def _settings(recipe: Path, options: tuple[tuple[str, Any], ...]) -> Settings:
    """`settings_of`, which takes a third of a second, once for all backbones and seeds."""
    from evmamba.launch.fit.cli import settings_of

    return settings_of(recipe, options)


def _check_training(spec: TrainingSpec, output: Path, elsewhere: bool = False) -> str:
    """Build data, model and trainer of a run once, and look at every file, as its own process will.

    For a run `elsewhere` the files are left to `evmamba data check`: a login node is not for that.

    Returns:
        The data's fingerprint.
    """
    from evmamba.launch.fit.cli import EvmambaCLI
    from evmamba.launch.fit.training import cli_arguments

    here = structs.replace(spec, device="cpu") if elsewhere else spec
    cli = EvmambaCLI(cli_arguments(here, output), run=False)
    cli.datamodule.fit_to(cli.model)
    if not elsewhere:
        cli.datamodule.setup("fit")
    return str(cli.datamodule.description()["fingerprint"])


def _check_backbone(name: str, pyramid: bool, pretrained: bool) -> None:
    from evmamba.tasks.backbones import PRETRAINED, build_backbone

    build_backbone(name, features_only=pyramid, checkpoint=PRETRAINED if pretrained else None)


def _precision(device: str) -> str | None:
    import torch

    # Without a GPU here the runs are planned for a cluster, whose GPUs have bfloat16 unless --precision says otherwise.
    can = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if device == "cuda" and can else None
