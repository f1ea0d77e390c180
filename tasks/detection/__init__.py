"""Object detection and instance segmentation: COCO data, torchvision detectors, COCO AP."""

from evmamba.tasks.detection.data import DetectionData
from evmamba.tasks.detection.module import DetectionModule

__all__ = ["DetectionData", "DetectionModule"]
