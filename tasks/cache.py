"""Where the project keeps what it can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$EVMAMBA_CACHE``, else ``~/.cache/evmamba``; it need not exist yet."""
    chosen = os.environ.get("EVMAMBA_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "evmamba"
