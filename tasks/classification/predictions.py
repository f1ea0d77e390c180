"""``predictions.csv``: the predicted class of every image."""

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L

from evmamba.tasks.predictions import PredictionLines

PREDICTION_FILE = "predictions.csv"


class ClassificationPredictions(PredictionLines):
    """Columns path, label, score."""

    def names(self, module: L.LightningModule) -> list[str]:
        return [PREDICTION_FILE]

    def header(self, name: str) -> str:
        return "path,label,score"

    def lines(self, trainer: L.Trainer, outputs: Any, batch: Any) -> Mapping[str, Iterable[str]]:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerows(zip(outputs["path"], outputs["label"], outputs["score"], strict=True))
        return {PREDICTION_FILE: text.getvalue().split("\n")[:-1]}
