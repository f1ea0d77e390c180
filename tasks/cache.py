"""Where the project keeps what it can make again."""

import os
from pathlib import Path

from evmamba.errors import UserError


def cache_folder() -> Path:
    """``$EVMAMBA_CACHE``, else ``~/.cache/evmamba``; it need not exist yet.

    Raises:
        UserError: the user has no home folder, as in a container that runs under any number.
    """
    chosen = os.environ.get("EVMAMBA_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "evmamba"
    except RuntimeError as error:
        raise UserError(
            f"user {os.getuid()} has no home folder for the cache; set EVMAMBA_CACHE to a folder you can write"
        ) from error
