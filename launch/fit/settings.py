"""What a run is told beyond the defaults of its classes, from recipe and options together.

LightningCLI's configuration says the value of every option there is. A run's settings are those that differ from their
defaults: enough to run it, and no more than what another run must share to be the same, so that an option added later
makes no old run another one.
"""

import copy
import functools
import json
import pydoc
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from evmamba.launch.store.spec import Settings

TRAINER = "lightning.pytorch.Trainer"
# Lightning's sampler pads the last batch by repeating images; the data modules bring exact ones.
TRAINER_DEFAULTS = {"use_distributed_sampler": False}
NOTHING = object()


def beyond_defaults(config: Mapping[str, Any]) -> Settings:
    """The settings of a whole configuration, as `EvmambaCLI.plain_config` gives it."""
    plain = _plain({part: config[part] for part in ("model", "data", "trainer")})
    return {
        "model": _told(plain["model"], NOTHING),
        "data": _told(plain["data"], NOTHING),
        "trainer": _told(plain["trainer"], defaults_of(TRAINER) | TRAINER_DEFAULTS),
    }


def setting(settings: Settings, option: str) -> Any:
    """The value of an option, e.g. ``"model.init_args.optimizer.lr"``: as told, or its default; None without one."""
    part, *names = option.split(".")
    told = _at(settings.get(part, {}), names)
    if told is not NOTHING:
        return told
    if part == "trainer":
        defaults = defaults_of(TRAINER) | TRAINER_DEFAULTS
    else:
        defaults, names = defaults_of(settings[part]["class_path"]), names[1:]  # without "init_args"
    value = _at(defaults, names)
    return None if value is NOTHING else value


def changed(settings: Settings, option: str, value: Any) -> Settings:
    """The same settings with another value of one option."""
    settings = copy.deepcopy(settings)
    inner = settings
    *names, last = option.split(".")
    for name in names:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return settings


@functools.cache
def defaults_of(class_path: str) -> dict[str, Any]:
    """The defaults of a class's options, those of dataclasses as mappings."""
    parser = ArgumentParser()
    parser.add_class_arguments(pydoc.locate(class_path), "options")
    return _plain(parser.get_defaults().options.as_dict())


def _told(value: Any, default: Any) -> Any:
    """What of a value differs from its default; all of it where there is none to compare with."""
    if isinstance(value, dict) and "class_path" in value:
        arguments = _told(value.get("init_args", {}), defaults_of(value["class_path"]))
        return {"class_path": value["class_path"]} | ({"init_args": arguments} if arguments else {})
    if isinstance(value, dict) and isinstance(default, dict):
        pairs = {name: (item, default.get(name, NOTHING)) for name, item in value.items()}
        return {name: _told(item, usual) for name, (item, usual) in pairs.items() if item != usual}
    if isinstance(value, list):
        return [_told(item, NOTHING) for item in value]
    return value


def _at(mapping: Any, names: list[str]) -> Any:
    for name in names:
        mapping = mapping.get(name, NOTHING) if isinstance(mapping, dict) else NOTHING
    return mapping


def _plain(value: Any) -> Any:
    """As JSON holds it, so that a tuple equals the list that a recipe gives."""
    return json.loads(json.dumps(value, default=str))
