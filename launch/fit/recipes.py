"""Finding recipes: files on disk, or those that the package brings along (`conf/`); and which one suits a network."""

import functools
import importlib
import math
from pathlib import Path

from evmamba.errors import UserError, unknown_name
from evmamba.tasks import TASKS, Task


def recipes() -> list[str]:
    """The tasks' recipes, named like files of the repository: ``conf/detection/tiny.yaml``."""
    return sorted(f"conf/{task.name}/{path.name}" for task in TASKS.values() for path in folder_of(task).glob("*.yaml"))


def folder_of(task: Task) -> Path:
    """The folder of a task's recipes."""
    package, _, folder = task.recipes.partition(":")
    return Path(importlib.import_module(package).__path__[0], folder)


def is_shipped(path: Path) -> bool:
    """Whether a recipe is one of those that the package brings along."""
    return any(path.resolve().is_relative_to(folder_of(task).resolve()) for task in TASKS.values())


def find_recipe(name: str) -> Path:
    """Find a recipe: a file on disk, else one of the package, with or without ``conf/`` and ``.yaml``.

    Raises:
        UserError: there is no such recipe; the nearest ones are named.
    """
    if Path(name).is_file():
        return Path(name)
    task, _, inside = name.removeprefix("./").removeprefix("conf/").partition("/")
    if inside and task in TASKS:
        for candidate in (inside, f"{inside}.yaml"):
            if (path := folder_of(TASKS[task]) / candidate).is_file():
                return path
    raise unknown_name("recipe", name, recipes())


def recipe_of(task: str, preset: str, head: str, model: str, schedule: str | None = None) -> Path:
    """The recipe of a preset: tiny.yaml, small.yaml, finetune.yaml, or for "paper" the model's own.

    Ablated networks have that of the published one. Networks of others have that of the variant which is nearest in
    parameters, and so the same as their equals; the recipes of T, S and B differ in nothing but the
    decoder's width and B's images per step on ImageNet. Of several schedules of a head the first is the default.

    Raises:
        UserError: there is no such recipe for this task and head.
    """
    record = TASKS[task]
    folder = folder_of(record)
    if preset != "paper":
        if not (path := folder / f"{preset}.yaml").is_file():
            raise UserError(f"there is no {preset} recipe for {task} ({path})")
        return path
    if schedules := record.head(head).schedules:
        head = f"{head}_{schedule or next(iter(schedules))}"
    from evmamba.variants import VARIANTS, split_name  # with torch and timm, which the lists of recipes do without

    names = {name: (record.paper_recipe or "").format(head=head, variant=name) for name in VARIANTS}
    paths = {name: path for name, file in names.items() if (path := folder / f"{file}.yaml").exists()}
    if not paths:
        raise UserError(f"there is no paper recipe for {task} with {head}")
    variant = split_name(model)[0]
    return paths[variant if variant in paths else _nearest(model, tuple(paths))]


@functools.cache
def _nearest(model: str, variants: tuple[str, ...]) -> str:
    size = math.log(_parameters(model))
    return min(variants, key=lambda variant: abs(math.log(_parameters(variant)) - size))


@functools.cache
def _parameters(model: str) -> int:
    from evmamba.tasks.backbones import build_backbone

    return sum(p.numel() for p in build_backbone(model, features_only=False, num_classes=1000).parameters())


@functools.cache
def has_drop_path(model: str) -> bool:
    """Whether a network knows stochastic depth; one that does not is trained without it, the rest of a recipe kept."""
    from evmamba.tasks.backbones import build_backbone

    try:
        build_backbone(model, features_only=False, drop_path_rate=0.1)
    except UserError:
        build_backbone(model, features_only=False)  # one that cannot be built at all says so here
        return False
    return True
