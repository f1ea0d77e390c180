"""Which modules a file may name. To import a module is to run it, and recipes and checkpoints come from anybody.

A file may name this package, Lightning, torch and its sisters, and besides those only what the user has named on the
command line: in an option's value (``--model my_task.Module``, ``--backbones my_networks:my_net``), or with
``--import``.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evmamba.errors import UserError

ALWAYS = ("evmamba", "lightning", "torch", "torchmetrics", "torchvision")
# Not a path's part, nor a file's name behind a folder: my_task.Module, my_networks:my_net
NAMED = re.compile(r"(?<![\w./\\-])([A-Za-z_]\w*)(?:(?:\.[A-Za-z_]\w*)+|:[A-Za-z_]\w*)(?![\w/\\-])")
FILES = ("--config", "-c", "--ckpt_path", "--checkpoint")

_trusted: dict[str, None] = dict.fromkeys(ALWAYS)


def trust(modules: Iterable[str]) -> None:
    """Let the files that this process reads name these modules, and what is below them.

    Raises:
        UserError: that is no name of a module, or one of Python's own.
    """
    for module in modules:
        root, *below = module.split(".")
        if not all(part.isidentifier() for part in (root, *below)) or root in sys.stdlib_module_names:
            raise UserError(f"--import {module}: write names of your own modules, with commas between them")
        _trusted[module] = None


def trusted() -> list[str]:
    return list(_trusted)


def check_trusted(name: str, what: str) -> None:
    """Refuse a module, or a class with its module before it, that nobody has named.

    Args:
        name: dotted, e.g. ``my_task.module.MyModule``.
        what: which file names it, for the message.

    Raises:
        UserError: the user has not named it.
    """
    if not any(name == module or name.startswith(f"{module}.") for module in _trusted):
        raise refusal(name, what)


def check_backbone(name: str, what: str) -> None:
    """See `check_trusted`; of a backbone's name, which has a module before it where it is ``module:name``."""
    module, colon, _ = name.partition(":")
    if colon:
        check_trusted(module, what)


def named_in(settings: Any) -> list[str]:
    """What a run's settings name to be imported: classes, and the modules of backbones ``module:name``."""
    if isinstance(settings, Mapping):
        found = [name for key, value in settings.items() for name in _named_at(str(key), value)]
    elif isinstance(settings, list | tuple):
        found = [name for value in settings for name in named_in(value)]
    else:
        found = []
    return list(dict.fromkeys(found))


def modules_in(settings: Any) -> list[str]:
    """The top-level modules that settings name, without Python's own: for a run that was planned or allowed before."""
    roots = dict.fromkeys(name.split(".")[0] for name in named_in(settings))
    return [root for root in roots if root.isidentifier() and root not in sys.stdlib_module_names]


def _named_at(key: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return (
            [value] if key == "class_path" else [value.partition(":")[0]] if key == "backbone" and ":" in value else []
        )
    return named_in(value)


def refusal(name: str, what: str) -> UserError:
    """The error for a name that may not be imported; what the user can allow, it says how."""
    root = name.split(".")[0]
    if root in sys.stdlib_module_names or root in _trusted:
        return UserError(f"{what} names '{name}': not to be called from there")
    return UserError(f"{what} names '{name}', and importing that would run it; if you know it, add --import {root}")


def named_by_user(args: Sequence[str]) -> list[str]:
    """Top-level modules of the names in options' values; what stands behind an option for a file is one."""
    found: dict[str, None] = {}
    option = ""
    for arg in args:
        option, equals, value = arg.partition("=") if arg.startswith("-") else (option, "=", arg)
        if equals and option not in FILES:
            found.update((match[1], None) for match in NAMED.finditer(value))
    return [module for module in found if module not in sys.stdlib_module_names]
