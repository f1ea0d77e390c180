"""Modules of the user's own, found where a command was given, as ``python -m`` finds them."""

import importlib
import sys
from pathlib import Path

from evmamba.errors import UserError


def look_here() -> None:
    """Have modules looked for in the working directory too, after everything that is installed."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def import_own(module: str, why: str) -> None:
    """Import a module for what it registers.

    Args:
        module: its dotted name.
        why: who needs it, for the message.

    Raises:
        UserError: there is no such module here or installed.
    """
    look_here()
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise UserError(f"there is no module '{module}' in {Path.cwd()} or installed; {why}") from error
