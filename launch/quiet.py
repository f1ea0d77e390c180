"""Silence what libraries say in every run and nobody here can follow, so that what matters can be seen."""

import logging
import warnings


def quiet_warnings() -> None:
    """Ignore advice that does not apply, and deprecations that only Lightning can follow."""
    for advice in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", message=advice)
    for module in (r"lightning\.pytorch\.cli", r"lightning\.pytorch\.utilities\._pytree"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
    # An advertisement, in every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())


def quiet_logs() -> None:
    """Leave out Lightning's remarks on devices and seeds, which results record."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
