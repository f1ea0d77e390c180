"""What several subcommands need."""

from importlib import metadata

from evmamba.errors import UserError


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def need_extra() -> None:
    """The training libraries are an extra; without them say so before an ImportError does."""
    try:
        metadata.version("lightning")
    except metadata.PackageNotFoundError:
        raise UserError(
            "training and reports need more libraries; in evmamba's folder: pip install '.[tasks]'"
        ) from None
