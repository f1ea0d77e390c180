"""Which images were right: accuracy of the whole test and of samples."""

import numpy as np

from evmamba.tasks.classification.per_image import Right


def test_accuracy_of_samples_of_the_images():
    kept = Right.of({"a": (True, True), "b": (False, True), "c": (False, False), "d": (True, True)})
    weights = np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 2, 2, 0]], dtype=float)
    assert kept.metric("top1", weights).tolist() == [0.5, 1.0, 0.0]
    assert kept.metric("top5", weights).tolist() == [0.75, 1.0, 0.5]
    assert kept.outcomes("top1").tolist() == [True, False, False, True]
