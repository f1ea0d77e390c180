"""Assignment and box encoding; whole sets of labels are compared in test_retinanet.py and test_rcnn.py."""

import pytest
import torch

from evmamba.tasks.detection.assign import OUTSIDE, OverlapMatcher, TwoSidedBoxCoder, assign


def test_an_objects_best_prior_is_taken_over_even_from_one_that_fits_better() -> None:
    """Two objects have the same best prior; the first overlaps it more, the later one gets it."""
    overlaps = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.3, 0.0]])
    assert OverlapMatcher(0.5, 0.4, least=0.0)(overlaps.clone()).tolist() == [1, -1, -1]
    assert OverlapMatcher(0.5, 0.4, least=None)(overlaps.clone()).tolist() == [0, -1, -1]


def test_an_object_below_the_least_overlap_gets_no_prior_and_ties_give_all() -> None:
    overlaps = torch.tensor([[0.2, 0.2, 0.1], [0.3, 0.1, 0.3]])
    assert OverlapMatcher(0.7, 0.3, least=0.3)(overlaps.clone()).tolist() == [1, -1, 1]
    assert OverlapMatcher(0.7, 0.3, least=0.0)(overlaps.clone()).tolist() == [1, 0, 1]


def test_priors_that_do_not_take_part_are_neither_objects_nor_background() -> None:
    priors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 9, 10], [30, 30, 40, 40]])
    matcher = OverlapMatcher(0.5, 0.4, least=0.0)
    counting = torch.tensor([False, True, True])
    assert assign(priors[:1], priors, matcher, counting).tolist() == [OUTSIDE, 0, -1]
    assert assign(priors[:0], priors, matcher, counting).tolist() == [OUTSIDE, -1, -1]
    assert assign(priors[:1], priors, matcher).tolist() == [0, 0, -1]


def test_boxes_come_back_from_their_code_and_sides_are_bounded_both_ways() -> None:
    coder = TwoSidedBoxCoder((10.0, 10.0, 5.0, 5.0))
    priors = torch.tensor([[10.0, 20, 40, 50], [0, 0, 8, 4]])
    boxes = torch.tensor([[12.0, 15, 60, 45], [1, 1, 5, 9]])
    assert coder.decode_single(coder.encode_single(boxes, priors), priors) == pytest.approx(boxes, abs=1e-5)
    far = torch.tensor([[0.0, 0, 100, -100], [0, 0, -100, 100]])
    sides = coder.decode_single(far, priors).unflatten(1, (2, 2)).diff(dim=1)[:, 0]
    assert sides == pytest.approx(torch.tensor([[30 * 62.5, 30 / 62.5], [8 / 62.5, 4 * 62.5]]), rel=1e-4)
