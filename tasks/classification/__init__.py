"""Image classification on folders of classes."""

from evmamba.tasks.classification.data import ClassificationData
from evmamba.tasks.classification.module import ClassificationModule

__all__ = ["ClassificationData", "ClassificationModule"]
