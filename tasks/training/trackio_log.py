"""Trackio as a logger of Lightning, which has none for it (2.6)."""

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Metrics of a run in Trackio (https://github.com/gradio-app/trackio).

    Args:
        project: its project.
        name: of the run; one that is there already goes on.
        save_dir: folder of the run, for Lightning.
    """

    def __init__(self, project: str, name: str, save_dir: str) -> None:
        super().__init__()
        self._project, self._name, self._folder = project, name, save_dir
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    @property
    def save_dir(self) -> str:
        return self._folder

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Trackio's run, which begins with the first thing that is logged."""
        if self._run is None:
            trackio = importlib.import_module("trackio")  # optional
            self._run = trackio.init(project=self._project, name=self._name, resume="allow")
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
