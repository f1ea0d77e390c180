"""Others' loggers by name, as LightningCLI takes them: Weights & Biases, MLflow and Comet by Lightning, Trackio by us.

A training has its own log always (`MetricsLog`); these come beside it. Where they send it and who may is the libraries'
own matter: WANDB_MODE, MLFLOW_TRACKING_URI, COMET_API_KEY, TRACKIO_SPACE_ID and the like.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evmamba.errors import UserError, unknown_name

OWN = "evmamba.tasks.training.metrics_log.MetricsLog"


class LoggerKind(NamedTuple):
    """A logger.

    Attributes:
        package: that has to be installed.
        class_path: of the logger.
        arguments: from project, run and folder to its constructor's.
    """

    package: str
    class_path: str
    arguments: Callable[[str, str, str], dict[str, Any]]


# A run that is continued goes on under its id, where the library has such.
LOGGERS = {
    "wandb": LoggerKind(
        "wandb",
        "lightning.pytorch.loggers.WandbLogger",
        lambda project, run, folder: {
            "project": project,
            "name": run,
            "id": run,  # which resumes
            "save_dir": folder,
        },
    ),
    "mlflow": LoggerKind(
        "mlflow",
        "lightning.pytorch.loggers.MLFlowLogger",
        lambda project, run, folder: {"experiment_name": project, "run_name": run},
    ),
    "comet": LoggerKind(
        "comet_ml",
        "lightning.pytorch.loggers.CometLogger",
        lambda project, run, folder: {"project": project},
    ),
    "trackio": LoggerKind(
        "trackio",
        "evmamba.tasks.training.trackio_log.TrackioLogger",
        lambda project, run, folder: {"project": project, "name": run, "save_dir": folder},
    ),
}


def check_logger(name: str) -> None:
    """See that a logger can be used.

    Raises:
        UserError: an unknown name, or its library is not installed.
    """
    if name not in LOGGERS:
        raise unknown_name("logger", name, LOGGERS)
    package = LOGGERS[name].package
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--logger {name} needs a library that is not installed: pip install {package}")


def logger_settings(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What LightningCLI's ``trainer.logger`` takes: a run's own log, and others'.

    Args:
        folder: of the run; the project is the benchmark's folder.
        names: of `LOGGERS`.
    """
    project = folder.absolute().parent.parent.name or "evmamba"
    own: list[dict[str, Any]] = [{"class_path": OWN, "init_args": {"save_dir": str(folder)}}]
    for name in names:
        kind = LOGGERS[name]
        arguments = kind.arguments(project, folder.name, str(folder))
        own.append({"class_path": kind.class_path, "init_args": arguments})
    return own
