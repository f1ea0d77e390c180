"""Silence what libraries say in every run and nobody here can follow, so that what matters can be seen."""

import logging
import sys
import warnings
from pathlib import Path


def quiet_warnings() -> None:
    """Ignore advice that does not apply, and deprecations that only Lightning can follow."""
    for advice in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
        ".*LeafSpec.*is deprecated.*",
        ".*is not supported by the model summary.*",
        ".*`srun` command is available.*",
        "When saving the DeepSpeed Stage 3 checkpoint.*",  # `evmamba consolidate` does what it refers to
    ):
        warnings.filterwarnings("ignore", message=advice)
    for module in (r"lightning\.pytorch\.cli", r"lightning\.pytorch\.utilities\._pytree"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
    # Of DeepSpeed's calls to what PyTorch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # A line for every checkpoint that is saved, on a default that stays as it is.
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    # A function of the module, because a logger takes the same filter once only.
    return not any(product in record.getMessage() for product in ("[litlogger]", "[litmodels]"))


def quiet_logs() -> None:
    """Leave out Lightning's remarks on devices and seeds, which results record; what this project says there stays."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_remark)


def _no_remark(record: logging.LogRecord) -> bool:
    lightning = sys.modules.get("lightning")
    return (
        record.levelno >= logging.WARNING
        or lightning is None
        or not Path(record.pathname).is_relative_to(lightning.__path__[0])
    )
