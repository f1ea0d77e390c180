"""Semantic segmentation: UPerNet on a feature pyramid, data in ADE20K's layout, mean IoU over the data set."""

from evmamba.tasks.segmentation.data import SegmentationData
from evmamba.tasks.segmentation.module import SegmentationModule

__all__ = ["SegmentationData", "SegmentationModule"]
