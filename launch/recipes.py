"""Finding recipes: files on disk, or those that the package brings along (`conf/`)."""

from pathlib import Path

import evmamba.conf
from evmamba.errors import unknown_name

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
