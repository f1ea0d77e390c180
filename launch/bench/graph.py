"""A benchmark as a graph of runs: what starts from what, on how many processes, and how they share a global batch.

`build_graph` turns the specs of `plan.plan` into the runs of `evmamba submit`, and of `evmamba bench --preset paper`:

    cost
    classification -> detection
                   -> segmentation (training) -> its evaluation, multi-scale too
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.tree import Tree

from evmamba.errors import UserError
from evmamba.launch.store.results import COST
from evmamba.launch.store.spec import Resources, RunSpec
from evmamba.tasks import TASKS, Task

BATCH_OPTION = "data.init_args.batch_size"
ACCUMULATE_OPTION = "trainer.accumulate_grad_batches"
LR_OPTION = "model.init_args.optimizer.lr"
SCALE_OPTION = "model.init_args.optimizer.scale_lr_to_batch"
CHECKPOINT_OPTION = "model.init_args.checkpoint"


def kind_of(spec: RunSpec) -> str:
    """For which resources are asked: the task, or "evaluation" for a run that only tests."""
    return "evaluation" if spec.stage == "test" else spec.task


def build_graph(specs: Iterable[RunSpec], resources: Callable[[str], Resources]) -> list[RunSpec]:
    """Give runs their resources and what they start from, in an order in which they can run one after the other.

    A detection or segmentation starts from the classification of the same model and seed, unless its options name
    another checkpoint. A segmentation becomes a training and an evaluation. (Their tasks' records say so.)

    Args:
        specs: what `plan.plan` returns; they are not changed.
        resources: nodes, devices and strategy of a kind of run (see `kind_of`).

    Raises:
        UserError: a recipe's global batch cannot be shared by that many processes.
    """
    specs = [dataclasses.replace(spec, needs=list(spec.needs)) for spec in specs]
    for spec in specs:
        spec.resources = dataclasses.replace(resources(kind_of(spec)))
        if spec.task != "cost":
            share_batch(spec)
    trained = {(spec.task, spec.model, spec.seed): spec for spec in specs}
    graph = []
    for spec in specs:
        task = None if spec.task == COST else TASKS[spec.task]
        start = trained.get((task.starts_from, spec.model, spec.seed)) if task and task.starts_from else None
        if start and setting(spec, CHECKPOINT_OPTION) is None:
            spec.start_after(start)
        if task and task.thorough:
            graph += _trained_and_evaluated(spec, task, resources)
        else:
            graph.append(spec)
    return graph


def _trained_and_evaluated(spec: RunSpec, task: Task, resources: Callable[[str], Resources]) -> list[RunSpec]:
    fit = dataclasses.replace(spec, stage="fit")
    test = dataclasses.replace(
        spec,
        stage="test",
        arguments=[*spec.arguments, *thorough_arguments(task)],
        needs=[],
        global_batch=None,
    )
    test.resources = dataclasses.replace(resources(kind_of(test)))
    test.start_after(fit)
    return [fit, test]


def thorough_arguments(task: Task) -> list[str]:
    """LightningCLI's options for the task's more expensive test."""
    return [f"--model.init_args.{name}={json.dumps(value)}" for name, value in task.thorough.items()]


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


def batch_of(spec: RunSpec) -> Batch | None:
    """The batch of a training as its spec has it; None where the recipe leaves it to the data module's default."""
    recipe_batch = setting(spec, BATCH_OPTION)
    if recipe_batch is None:
        return None
    accumulate = int(setting(spec, ACCUMULATE_OPTION) or 1)
    intended = setting(spec, SCALE_OPTION)
    lr = setting(spec, LR_OPTION)
    own = spec.resources
    batch = Batch(
        per_process=own.batch_size or int(recipe_batch),
        accumulate=own.accumulate or accumulate,
        processes=own.processes,
        lr=None if lr is None else float(lr),
        recipe=int(intended or int(recipe_batch) * accumulate),
        scaled=intended is not None,
    )
    if batch.scaled and batch.lr is not None:
        batch = dataclasses.replace(batch, lr=batch.lr * batch.total / batch.recipe)
    return batch


def share_batch(spec: RunSpec) -> None:
    """Set how the recipe's global batch is shared by the spec's processes: fewer images each, or several steps.

    The global batch is the one that ``scale_lr_to_batch`` names, else the recipe's batch for one process. A batch given
    by ``--set`` is per process and is left alone; the global batch then is what results.

    Raises:
        UserError: it cannot be divided.
    """
    batch = batch_of(spec)
    if batch is None:
        return
    one_process = int(setting(spec, BATCH_OPTION) or 1) * int(setting(spec, ACCUMULATE_OPTION) or 1)
    if not any(_given(spec, option) for option in (BATCH_OPTION, ACCUMULATE_OPTION)):
        if batch.recipe % batch.processes:
            raise UserError(_indivisible(spec, batch))
        share = batch.recipe // batch.processes
        accumulate = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= batch.per_process)
        if share // accumulate != batch.per_process:
            spec.resources.batch_size = share // accumulate
        if accumulate != batch.accumulate:
            spec.resources.accumulate = accumulate
    total = batch_of(spec).total  # type: ignore[union-attr]
    spec.global_batch = None if total == one_process else total


def _indivisible(spec: RunSpec, batch: Batch) -> str:
    fitting = max(n for n in range(1, min(batch.recipe, batch.processes) + 1) if batch.recipe % n == 0)
    lr = f", lr {'x ' + format(batch.processes / batch.recipe, '.3g') if batch.scaled else 'unchanged'}"
    return (
        f"{spec.task} has {batch.recipe} images a step in its recipe, which {batch.processes} processes cannot share; "
        f"give it fewer (--nodes {spec.task}=N, --gpus-per-node {spec.task}=N; {fitting} would do), or choose another "
        f"batch: --set {spec.task}.{BATCH_OPTION}=1 is {batch.processes} images a step{lr}"
    )


def setting(spec: RunSpec, option: str) -> Any:
    """The value of an option, from the spec's arguments or its recipe; None where neither gives it."""
    given = _given(spec, option)
    if given is not None:
        return yaml.safe_load(given)
    value: Any = _recipe(spec.recipe)
    for part in option.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _given(spec: RunSpec, option: str) -> str | None:
    """What the arguments say, the last one counting."""
    prefix = f"--{option}="
    return next((a.removeprefix(prefix) for a in reversed(spec.arguments) if a.startswith(prefix)), None)


@functools.cache
def _recipe(path: str | None) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else {}


def tree(specs: Sequence[RunSpec], describe: Callable[[RunSpec], str], last: str | None = None) -> Tree:
    """The graph for a terminal: every run under what it needs, and after all of them `last`."""
    root = Tree("runs", hide_root=True)
    branches: dict[str, Tree] = {}
    for spec in specs:
        above = branches.get(spec.needs[0], root) if spec.needs else root
        branches[spec.name] = above.add(describe(spec), highlight=False)
    if last:
        root.add(last, highlight=False)
    return root
