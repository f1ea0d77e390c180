"""jsonargparse's long explanations of wrong options and recipes, made one line."""

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Iterable

from evmamba.errors import UserError, unknown_name
from evmamba.tasks import TASKS
from evmamba.tasks.trust import refusal

# Lines of jsonargparse's explanations that say nothing to the user.
NOISE = re.compile(
    r"^(Does not validate against any|Subtypes: |Errors:|Given value type: |Given value: |"
    r"Expected a <class 'NoneType'>|Problem with given class_path|Expected a path but )"
)


def short_error(message: str, options: Iterable[str]) -> UserError:
    """Turn jsonargparse's explanation of a wrong argument or recipe into one line.

    Args:
        message: what the ArgumentError says, often ten lines.
        options: the parser's own options, to offer the nearest one.
    """
    if match := re.search(r"Importing '(\w+)([\w.]*)' is not allowed", message):
        return refusal(match[1] + match[2], "the recipe")
    classes = re.findall(r"class_path '([\w.]+)'", message)
    if match := re.search(r"Option '([\w.]+)' is not accepted", message):
        return _unknown_option(match[1], classes)
    if match := re.search(r"unrecognized arguments: (--)?([^\s=]+)", message):
        if classes:
            return _unknown_option(match[2], classes)
        return unknown_name("option", (match[1] or "") + match[2], options)
    if match := re.search(r"does not accept option '([\w.]+)'", message):
        return unknown_name("option", match[1], (option.removeprefix("--") for option in options))
    if match := re.search(r"arguments are required: (?:\w+\.)?(\w+)", message):
        return UserError(f"nothing says which {match[1]} to use; name a recipe, e.g. --config conf/detection/tiny.yaml")
    if match := re.search(r"Expected a dot import path string: (\S+)|No module named '([\w.]+)'", message):
        name = match[1] or match[2]
        known = [path for task in TASKS.values() for path in (task.module, task.data)]
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        return UserError(f"unknown class '{name}'; write it like {nearest}")
    return UserError(_essence(message))


def _unknown_option(name: str, classes: list[str]) -> UserError:
    """The error for an option that the innermost class does not have."""
    module, _, class_name = classes[-1].rpartition(".")
    return unknown_name(
        f"option of {class_name}", name, _parameters(getattr(importlib.import_module(module), class_name))
    )


def _parameters(kind: type) -> list[str]:
    """Names of a class's arguments; those of a dataclass argument as ``argument.field``."""
    hints = typing.get_type_hints(inspect.getattr_static(kind, "__init__"))
    names = []
    for name in list(inspect.signature(kind).parameters):
        names.append(name)
        if dataclasses.is_dataclass(hints.get(name)):
            names += [f"{name}.{field.name}" for field in dataclasses.fields(hints[name])]
    return names


def _essence(message: str) -> str:
    """The telling lines of an explanation, joined: where, what was expected, what was given."""
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    where = [match[1] for line in lines if (match := re.match(r'Parser key "([\w.]+)":', line))]
    said = [re.sub(r"<class '(\w+)'>", r"\1", line) for line in lines if line and not NOISE.match(line)]
    said = [line for line in dict.fromkeys(said) if not line.startswith("Parser key ")]
    given = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), None)
    said = [re.sub(r"Expected a typing.Literal\[([^]]*)\]", r"one of \1", line) for line in said]
    text = (f"{where[-1]}: " if where else "") + " or ".join(said)
    if given is not None and "NestedArg" not in given and "Got value" not in text and len(given) < 80:
        text += f", not '{given}'"
    return text
