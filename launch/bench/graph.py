"""A benchmark as a graph of runs: what starts from what, on how many processes, and how they share a global batch.

`build_graph` turns the specs of `plan.plan` into the runs of `evmamba submit`, and of `evmamba bench --preset paper`:

    cost
    classification -> detection
                   -> segmentation (training) -> its evaluation, multi-scale too
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import structs
from rich.tree import Tree

from evmamba.errors import UserError
from evmamba.launch.fit.settings import changed, setting
from evmamba.launch.store.spec import EvaluationSpec, Resources, Settings, Spec, Start, TrainingSpec
from evmamba.tasks import TASKS, Task

BATCH_OPTION = "data.init_args.batch_size"
ACCUMULATE_OPTION = "trainer.accumulate_grad_batches"
LR_OPTION = "model.init_args.optimizer.lr"
SCALE_OPTION = "model.init_args.optimizer.scale_lr_to_batch"
DROP_PATH_OPTION = "model.init_args.drop_path_rate"
HELD_OUT_OPTION = "data.init_args.held_out"
CHECKPOINT_OPTION = "model.init_args.checkpoint"


def kind_of(spec: Spec) -> str:
    """For which resources are asked: the task, or "evaluation" for a run that only tests."""
    return "evaluation" if isinstance(spec, EvaluationSpec) else spec.task


def build_graph(specs: Iterable[Spec], resources: Callable[[str], Resources]) -> list[Spec]:
    """Give runs their resources and what they start from, in an order in which they can run one after the other.

    A detection or segmentation starts from the classification of the same model and seed, unless its options name
    another checkpoint. A segmentation becomes a training and an evaluation. (Their tasks' records say so.) Trials of a
    search stay as they are.

    Args:
        specs: what `plan` returns.
        resources: nodes, devices and strategy of a kind of run (see `kind_of`).

    Raises:
        UserError: a recipe's global batch cannot be shared by that many processes.
    """
    specs = [placed(spec, resources(kind_of(spec))) for spec in specs]
    trainings = [spec for spec in specs if isinstance(spec, TrainingSpec) and not (spec.trials or is_trial(spec))]
    trained = {(spec.task, spec.model, spec.seed): spec for spec in trainings}
    graph: list[Spec] = []
    for spec in specs:
        if not isinstance(spec, TrainingSpec) or is_trial(spec):
            graph.append(spec)
            continue
        task = TASKS[spec.task]
        start = trained.get((task.starts_from, spec.model, spec.seed)) if task.starts_from else None
        if start and setting(spec.settings, CHECKPOINT_OPTION) is None:
            spec = spec.after(start)
        graph += _trained_and_evaluated(spec, task, resources) if task.thorough else [spec]
    return graph


def is_trial(spec: Spec) -> bool:
    """Whether a run tries settings for a search: it is tested on training images that are held out."""
    return isinstance(spec, TrainingSpec) and bool(setting(spec.settings, HELD_OUT_OPTION))


def _trained_and_evaluated(spec: TrainingSpec, task: Task, resources: Callable[[str], Resources]) -> list[Spec]:
    training = structs.replace(spec, test=False)
    evaluation = _evaluation_of(training, settings=thorough(spec.settings, task))
    return [training, placed(evaluation, resources(kind_of(evaluation)))]


def _evaluation_of(training: TrainingSpec, **changes: Any) -> EvaluationSpec:
    same = {
        name: getattr(training, name)
        for name in ("task", "model", "head", "seed", "device", "suite", "recipe", "trials")
    }
    same |= {"settings": training.settings, "data_fingerprint": training.data_fingerprint}
    return EvaluationSpec(**same | changes, start=Start.of(training), needs=(training.name,))


def with_exported(graph: Iterable[Spec]) -> list[Spec]:
    """The graph with every trained network tested as ONNX files too, in evaluations: trainings stay what they are."""
    tested: list[Spec] = []
    for spec in graph:
        if isinstance(spec, EvaluationSpec):
            spec = placed(structs.replace(spec, exported=True), spec.resources)
        tested.append(spec)
        if isinstance(spec, TrainingSpec) and spec.test and not is_trial(spec):
            tested.append(placed(_evaluation_of(spec, exported=True), spec.resources))
    return tested


def placed(spec: Spec, resources: Resources) -> Spec:
    """A run on other resources, a training with its global batch shared by them (see `share_batch`).

    Exported networks are tested by one process, wherever.

    Raises:
        UserError: it cannot be divided.
    """
    alone = isinstance(spec, EvaluationSpec) and spec.exported
    spec = structs.replace(spec, resources=Resources() if alone else resources)
    return share_batch(spec) if isinstance(spec, TrainingSpec) else spec


def thorough(settings: Settings, task: Task) -> Settings:
    """The same settings with the task's more expensive test."""
    for name, value in task.thorough.items():
        settings = changed(settings, f"model.init_args.{name}", value)
    return settings


@dataclass(frozen=True)
class Batch:
    """How a training's images are shared.

    Attributes:
        per_process: images per process and step.
        accumulate: steps whose gradients are added up to one optimizer step.
        processes: number of them.
        lr: peak learning rate at this global batch; None where the recipe does not say it.
        recipe: the global batch that the recipe's learning rate is for, or that of one process.
        scaled: whether the recipe scales its learning rate with the batch.
    """

    per_process: int
    accumulate: int
    processes: int
    lr: float | None
    recipe: int
    scaled: bool

    @property
    def total(self) -> int:
        return self.per_process * self.accumulate * self.processes

    def __str__(self) -> str:
        shares = [str(self.per_process)] + ([f"{self.accumulate} (accumulated)"] if self.accumulate > 1 else [])
        shares += [f"{self.processes} processes"] if self.processes > 1 else []
        text = f"{self.total} images a step" + (f" = {' x '.join(shares)}" if len(shares) > 1 else "")
        if self.lr is None:
            return text
        if self.total == self.recipe:
            return f"{text}, the recipe's; lr {self.lr:.3g}"
        factor = self.total / self.recipe
        if self.scaled:
            return f"{text} (recipe {self.recipe}), lr {self.lr:.3g}: x {factor:.3g}, linearly"
        return f"{text} (recipe {self.recipe}), lr {self.lr:.3g}: not scaled, the recipe has no scale_lr_to_batch"


def batch_of(spec: TrainingSpec) -> Batch | None:
    """The batch of a training as its spec has it; None where its data module has no option for it."""
    images = setting(spec.settings, BATCH_OPTION)
    if images is None:
        return None
    accumulate = setting(spec.settings, ACCUMULATE_OPTION) or 1
    intended = setting(spec.settings, SCALE_OPTION)
    lr = setting(spec.settings, LR_OPTION)
    own = spec.resources
    batch = Batch(
        per_process=own.batch_size or images,
        accumulate=own.accumulate or accumulate,
        processes=own.processes,
        lr=lr,
        recipe=intended or images * accumulate,
        scaled=intended is not None,
    )
    if batch.scaled and batch.lr is not None:
        batch = dataclasses.replace(batch, lr=batch.lr * batch.total / batch.recipe)
    return batch


def share_batch(spec: TrainingSpec) -> TrainingSpec:
    """Let the spec's processes share the recipe's global batch: fewer images each, or several steps.

    The global batch is the one that ``scale_lr_to_batch`` names, else the recipe's batch for one process. A batch given
    by ``--set`` (`TrainingSpec.own_batch`) is per process and is left alone; the global batch then is what results.

    Raises:
        UserError: it cannot be divided.
    """
    own = structs.replace(spec.resources, batch_size=None, accumulate=None)
    spec = structs.replace(spec, resources=own, global_batch=None)
    batch = batch_of(spec)
    if batch is None:
        return spec
    one_process = batch.per_process * batch.accumulate
    if not spec.own_batch:
        if batch.recipe % batch.processes:
            raise UserError(_indivisible(spec, batch))
        share = batch.recipe // batch.processes
        accumulate = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= batch.per_process)
        own = structs.replace(
            own,
            batch_size=share // accumulate if share // accumulate != batch.per_process else None,
            accumulate=accumulate if accumulate != batch.accumulate else None,
        )
        batch = dataclasses.replace(batch, per_process=share // accumulate, accumulate=accumulate)
    return structs.replace(spec, resources=own, global_batch=None if batch.total == one_process else batch.total)


def _indivisible(spec: TrainingSpec, batch: Batch) -> str:
    fitting = max(n for n in range(1, min(batch.recipe, batch.processes) + 1) if batch.recipe % n == 0)
    lr = f", lr {'x ' + format(batch.processes / batch.recipe, '.3g') if batch.scaled else 'unchanged'}"
    return (
        f"{spec.task} has {batch.recipe} images a step in its recipe, which {batch.processes} processes cannot share; "
        f"give it fewer (--nodes {spec.task}=N, --gpus-per-node {spec.task}=N; {fitting} would do), or choose another "
        f"batch: --set {spec.task}.{BATCH_OPTION}=1 is {batch.processes} images a step{lr}"
    )


def tree(specs: Sequence[Spec], describe: Callable[[Spec], str], last: str | None = None) -> Tree:
    """The graph for a terminal: every run under what it needs, and after all of them `last`."""
    root = Tree("runs", hide_root=True)
    branches: dict[str, Tree] = {}
    for spec in specs:
        above = branches.get(spec.needs[0], root) if spec.needs else root
        branches[spec.name] = above.add(describe(spec), highlight=False)
    if last:
        root.add(last, highlight=False)
    return root
