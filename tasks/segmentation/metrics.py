"""Intersection over union and accuracies from one confusion matrix over the whole data set.

The definition is that of the ADE20K benchmark: intersections and unions are summed over all images before they are
divided. (torchmetrics' own ``MeanIoU`` averages per sample, which is another number.)
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

IGNORE_INDEX = 255


class SegmentationMetrics(Metric):
    """Mean IoU, per-class IoU, pixel accuracy and mean class accuracy, exact for any number of processes.

    The only state is an int64 confusion matrix ``[truth, prediction]`` that processes add up, so how images are spread
    over processes and batches cannot change a digit.

    Args:
        num_classes: C.
        ignore_index: label whose pixels count nowhere, neither as truth nor as a false prediction.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    confusion: Tensor

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX, **metric_options: Any) -> None:
        super().__init__(**metric_options)  # torchmetrics refuses options that it does not know
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count pixels.

        Args:
            prediction: class indices ``0..C-1``, any shape, integer.
            label: same shape; ``0..C-1`` or ``ignore_index``, integer.
        """
        self.confusion += confusion_matrix(prediction, label, self.num_classes, self.ignore_index)

    def compute(self) -> dict[str, Tensor]:
        """Fractions in [0, 1].

        ``mIoU`` leaves out classes that occur neither in labels nor in predictions, ``mean_acc`` those that do not
        occur in labels; ``IoU`` and ``acc`` (``[C]``, float64) are NaN there. ``confusion`` is the matrix over all
        processes (int64); the state of that name is only this process's again when `compute` has returned.
        """
        confusion = self.confusion.double() if self.confusion.device.type != "mps" else self.confusion.cpu().double()
        hit = confusion.diagonal()
        in_label, in_prediction = confusion.sum(1), confusion.sum(0)
        iou = hit / (in_label + in_prediction - hit)  # 0 / 0 is NaN: the class does not occur
        acc = hit / in_label
        return {
            "mIoU": iou.nanmean(),
            "pixel_acc": hit.sum() / confusion.sum(),
            "mean_acc": acc.nanmean(),
            "IoU": iou,
            "acc": acc,
            "confusion": self.confusion.clone(),
        }


def confusion_matrix(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Count pixels, int64 [truth, prediction]; arguments as of `SegmentationMetrics.update`."""
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and label {tuple(label.shape)} differ in shape")
    counted = label != ignore_index
    pair = label[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pair, minlength=num_classes**2).view(num_classes, num_classes)
