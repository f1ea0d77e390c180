"""Pictures of detections: what is drawn, and that it stays inside."""

import math

import numpy as np
import pytest
import torch

from evmamba.tasks.detection.gallery import PANEL_SIDE, TITLE_HEIGHT, draw_comparison, error_share

NAMES = ["disc", "square"]


def prediction(*scores: float) -> dict[str, torch.Tensor]:
    boxes = torch.tensor([[10.0, 10, 40, 40], [11, 11, 41, 41], [60, 5, 95, 60]])[: len(scores)]
    return {"boxes": boxes, "labels": torch.tensor([0, 1, 1])[: len(scores)], "scores": torch.tensor(scores)}


def changed(found: dict[str, torch.Tensor]) -> np.ndarray:
    """Pixels of the prediction panel that differ from those without a detection, [PANEL_SIDE * 2 / 3, PANEL_SIDE]."""
    image, truth = torch.zeros(3, 64, 96), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty = {key: value[:0] for key, value in found.items()}
    pictures = [np.asarray(draw_comparison(image, which, truth, NAMES)) for which in (found, empty)]
    differ = (pictures[0] != pictures[1]).any(-1)
    return differ[TITLE_HEIGHT : TITLE_HEIGHT + round(PANEL_SIDE * 2 / 3), :PANEL_SIDE]


def test_of_detections_at_one_place_the_best_is_drawn() -> None:
    assert np.array_equal(changed(prediction(0.9, 0.8)), changed(prediction(0.9)))


def test_unsure_detections_are_drawn_only_where_there_is_no_sure_one() -> None:
    assert changed(prediction(0.1)).any()
    assert not changed(prediction(0.9, 0.0, 0.1))[:, PANEL_SIDE * 55 // 96 :].any()


def test_masks_colour_their_pixels() -> None:
    found = prediction(0.9)
    found["masks"] = torch.zeros(1, 1, 64, 96)
    found["masks"][0, 0, 20:30, 20:30] = 1
    drawn = changed(found)
    centre = round(25 * PANEL_SIDE / 96)
    assert drawn[centre, centre]
    assert not changed(prediction(0.9))[centre, centre]


def test_wide_images_are_stacked() -> None:
    truth = {"boxes": torch.tensor([[0.0, 0, 300, 60]]), "labels": torch.tensor([1])}
    picture = draw_comparison(torch.rand(3, 60, 300), prediction(0.9, 0.1, 0.5), truth, NAMES)
    assert picture.size == (PANEL_SIDE, 2 * (128 + TITLE_HEIGHT) + 8)


def test_strips_keep_a_pixel() -> None:
    truth = {"boxes": torch.tensor([[0.0, 0, 900, 1]]), "labels": torch.tensor([1])}
    picture = draw_comparison(torch.rand(3, 1, 2000), prediction(), truth, NAMES)
    assert picture.size == (PANEL_SIDE, 2 * (1 + TITLE_HEIGHT) + 8)


def test_the_share_of_errors_counts_missed_false_doubled_and_misnamed_objects():
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), "labels": torch.tensor([0, 1])}

    def found(boxes: list, labels: list, scores: list) -> float:
        prediction = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels)}
        return error_share(prediction | {"scores": torch.tensor(scores)}, target)

    first, second = [0.0, 0, 10, 10], [20.0, 20, 40, 40]
    assert found([first, second], [0, 1], [0.9, 0.8]) == 0
    assert found([first, second], [0, 1], [0.9, 0.1]) == pytest.approx(1 / 2)  # too unsure: one of two is missed
    assert found([first, first, second], [0, 0, 1], [0.9, 0.8, 0.8]) == pytest.approx(1 / 3)  # found twice
    assert found([first, second], [1, 1], [0.9, 0.8]) == pytest.approx(2 / 3)  # misnamed: missed and false
    assert found([], [], []) == 1
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert math.isnan(error_share(nothing | {"scores": torch.zeros(0)}, nothing))
