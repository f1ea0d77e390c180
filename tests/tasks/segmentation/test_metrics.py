from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing

from evmamba.tasks.segmentation.labels import LabelMap
from evmamba.tasks.segmentation.metrics import IGNORE_INDEX, SegmentationMetrics
from evmamba.tasks.training.samplers import EvaluationSampler

from ..golden import per_image


def test_values_equal_those_of_a_confusion_matrix_made_by_hand():
    metric = SegmentationMetrics(5)
    # Class 0: three right, one seen as 1; class 1: two right; class 2: seen as 3; class 4 occurs nowhere.
    metric.update(torch.tensor([[0, 0, 0, 1], [1, 1, 3, 4]]), torch.tensor([[0, 0, 0, 0], [1, 1, 2, IGNORE_INDEX]]))
    metric.update(torch.tensor([3]), torch.tensor([IGNORE_INDEX]))
    values = metric.compute()
    iou = [3 / 4, 2 / 3, 0.0, 0.0]
    assert values["IoU"][:4].tolist() == iou
    assert values["IoU"][4].isnan()
    assert values["mIoU"].item() == pytest.approx(sum(iou) / 4, abs=1e-15)  # class 4 is left out
    assert values["pixel_acc"].item() == 5 / 7
    assert values["mean_acc"].item() == pytest.approx((3 / 4 + 1 + 0) / 3, abs=1e-15)  # class 3 has no label


def test_areas_and_means_are_mmsegmentations(golden_heads: Callable[[str], dict[str, Tensor]]):
    data = golden_heads("iou_metric")
    classes = int(data["num_classes"])
    label_map = LabelMap(classes, reduce_zero_label=True, ignore_label=None)
    total = SegmentationMetrics(classes)
    for k, prediction in enumerate(per_image(data, "prediction")):
        label = torch.from_numpy(label_map.to_index(data[f"file_{k}"].numpy()))
        assert torch.equal(label, data[f"label_{k}"])
        own = SegmentationMetrics(classes)
        for metric in (own, total):
            metric.update(prediction, label)
        assert torch.equal(areas(own), data["areas"][k])
    assert torch.equal(areas(total), data["total"])
    values = total.compute()
    stored = {"IoU": "IoU", "acc": "Acc", "pixel_acc": "aAcc", "mIoU": "mIoU", "mean_acc": "mAcc"}
    for own_name, name in stored.items():
        torch.testing.assert_close(values[own_name], data[name].double(), rtol=0, atol=1e-12, equal_nan=True)
    printed = [round(100 * values[name].item(), 2) for name in ("pixel_acc", "mIoU", "mean_acc")]
    assert printed == pytest.approx(data["printed"].tolist(), abs=1e-5)


def areas(metric: SegmentationMetrics) -> Tensor:
    """Intersection, union, predicted and labelled pixels, [4, classes]."""
    hit, predicted, labelled = metric.confusion.diagonal(), metric.confusion.sum(0), metric.confusion.sum(1)
    return torch.stack([hit, predicted + labelled - hit, predicted, labelled])


def test_sums_over_the_data_set_come_before_the_division():
    metric = SegmentationMetrics(2)
    metric.update(torch.zeros(10, dtype=torch.long), torch.zeros(10, dtype=torch.long))  # image with IoU 1
    metric.update(torch.tensor([1, 1]), torch.tensor([0, 1]))  # image with IoU 0 and 1/2
    assert metric.compute()["mIoU"].item() == pytest.approx((10 / 11 + 1 / 2) / 2, abs=1e-15)


def test_counts_are_integers_that_do_not_saturate():
    metric = SegmentationMetrics(2)
    metric.confusion += 2**40
    metric.update(torch.tensor([1], dtype=torch.uint8), torch.tensor([1], dtype=torch.uint8))
    assert metric.confusion[1, 1].item() == 2**40 + 1
    assert metric.confusion.dtype == torch.int64


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        SegmentationMetrics(2).update(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))


NUM_IMAGES, NUM_CLASSES = 4, 7


def _images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(3)

    def draw(size: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, NUM_CLASSES, size))

    images = []
    for k in range(NUM_IMAGES):
        truth = draw((11 + k, 13))
        truth[0] = IGNORE_INDEX
        wrong = torch.from_numpy(rng.random(tuple(truth.shape)) < 0.5)
        images.append((torch.where(wrong, draw(tuple(truth.shape)), truth % NUM_CLASSES), truth))
    return images


def _evaluate(rank: int, folder: str) -> None:
    """In every group of the first 1, 2 and 3 processes, evaluate this process's share."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    images = _images()
    for world in (1, 2, 3):
        group = torch.distributed.new_group(list(range(world)))
        if rank < world:
            metric = SegmentationMetrics(NUM_CLASSES, process_group=group)
            for k in EvaluationSampler(NUM_IMAGES, rank, world):
                metric.update(*images[k])
            torch.save(metric.compute(), f"{folder}/{world}_{rank}.pt")
    torch.distributed.destroy_process_group()


def test_one_two_and_three_processes_give_identical_digits(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(_evaluate, (str(tmp_path),), nprocs=3)
    alone = SegmentationMetrics(NUM_CLASSES)
    for prediction, truth in _images():
        alone.update(prediction, truth)
    expected = alone.compute()
    for world in (1, 2, 3):
        for rank in range(world):
            for name, value in torch.load(tmp_path / f"{world}_{rank}.pt").items():
                assert torch.equal(value, expected[name]), (world, rank, name)
