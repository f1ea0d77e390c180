"""Finding recipes: files on disk, or those that the package brings along (`conf/`); and which one suits a network."""

import functools
import math
from pathlib import Path

import evmamba.conf
from evmamba.errors import UserError, unknown_name

CONF = Path(evmamba.conf.__path__[0])


def recipes() -> list[str]:
    """The packaged recipes, named like files of the repository: ``conf/detection/tiny.yaml``."""
    return sorted(f"conf/{path.relative_to(CONF).as_posix()}" for path in CONF.glob("*/*.yaml"))


def find_recipe(name: str) -> Path:
    """Find a recipe: a file on disk, else one of the package, with or without ``conf/`` and ``.yaml``.

    Raises:
        UserError: there is no such recipe; the nearest ones are named.
    """
    if Path(name).is_file():
        return Path(name)
    inside = name.removeprefix("./").removeprefix("conf/")
    for candidate in (CONF / inside, CONF / f"{inside}.yaml"):
        if candidate.is_file():
            return candidate
    raise unknown_name("recipe", name, recipes())


def recipe_of(task: str, preset: str, head: str, model: str, schedule: str | None = None) -> Path:
    """The recipe of a preset: tiny.yaml, small.yaml, or for "paper" the model's own.

    Ablated networks have that of the published one. Networks of others have that of the variant which is nearest in
    parameters, and so the same as their equals; the recipes of T, S and B differ in nothing but the
    decoder's width and B's images per step on ImageNet. Of Mask R-CNN's two schedules 1x is the default.

    Raises:
        UserError: the package has no recipe for this head.
    """
    if preset != "paper":
        return CONF / task / f"{preset}.yaml"
    kind = {"classification": "imagenet", "segmentation": f"ade20k_{head}"}.get(task, f"coco_{head}")
    if head == "maskrcnn":
        kind += f"_{schedule or '1x'}"
    from evmamba.variants import VARIANTS, split_name  # with torch and timm, which the lists of recipes do without

    paths = {name: path for name in VARIANTS if (path := CONF / task / f"{kind}_{name}.yaml").exists()}
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
