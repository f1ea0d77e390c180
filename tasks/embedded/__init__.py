"""Tiny data sets drawn on the user's disk on first use, in the layouts of the real ones. No download."""

from evmamba.tasks.embedded.cache import ensure_embedded
from evmamba.tasks.embedded.landscapes import SEGMENTATION_CLASSES, write_segmentation
from evmamba.tasks.embedded.seabed import DETECTION_CATEGORIES, write_detection
from evmamba.tasks.embedded.signs import CLASSIFICATION_CLASSES, write_classification

__all__ = [
    "CLASSIFICATION_CLASSES",
    "DETECTION_CATEGORIES",
    "SEGMENTATION_CLASSES",
    "ensure_embedded",
    "write_classification",
    "write_detection",
    "write_segmentation",
]
