"""Anchors against mmdetection's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from evmamba.tasks.detection.anchors import AnchorGrid
from evmamba.tasks.detection.detectors import build_detector

from ..golden import per_image


@pytest.fixture(scope="module")
def grids() -> dict[str, AnchorGrid]:
    rcnn = build_detector("fasterrcnn", "resnet10t", 2, channels=8)
    return {
        "retina": build_detector("retinanet", "resnet10t", 2, channels=8).anchor_generator,
        "rpn": rcnn.rpn.anchor_generator,
    }


@pytest.mark.parametrize("kind", ["retina", "rpn"])
def test_anchors_of_a_cell_are_not_rounded(
    golden_heads: Callable[[str], dict[str, Tensor]], grids: dict[str, AnchorGrid], kind: str
) -> None:
    expected = per_image(golden_heads("anchors"), f"{kind}_base")
    assert len(expected) == len(grids[kind].cell_anchors)
    for cell, own in zip(grids[kind].cell_anchors, expected, strict=True):
        torch.testing.assert_close(cell, own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["retina", "rpn"])
def test_the_grid_has_fixed_strides_and_knows_which_anchors_lie_in_an_images_own_padding(
    golden_heads: Callable[[str], dict[str, Tensor]], grids: dict[str, AnchorGrid], kind: str
) -> None:
    data = golden_heads("anchors")
    cases = sorted(key.removesuffix("_image") for key in data if key.startswith(kind) and key.endswith("_image"))
    assert cases
    for prefix in cases:
        check_grid(data, prefix, grids[kind])


def check_grid(data: dict[str, Tensor], prefix: str, grid: AnchorGrid) -> None:
    maps = [torch.empty(1, 1, *size.tolist()) for size in data[f"{prefix}_sizes"]]
    sizes = [tuple(level.shape[-2:]) for level in maps]
    levels = grid.level_anchors(sizes, maps[0])
    wide = grid.level_anchors(sizes, maps[0].double())
    for k, (level, double) in enumerate(zip(levels, wide, strict=True)):
        assert len(level) == data[f"{prefix}_count_{k}"]
        expected = data[f"{prefix}_anchors_{k}"].float()
        shown = level if len(level) <= 1200 else torch.cat([level[:300], level[-300:]])
        torch.testing.assert_close(shown, expected, rtol=0, atol=5e-5)
        torch.testing.assert_close(double.sum(0), data[f"{prefix}_sum_{k}"], rtol=1e-10, atol=1e-6)
        torch.testing.assert_close(double.square().sum(0), data[f"{prefix}_sumsq_{k}"], rtol=1e-10, atol=1e-6)
    height, width = data[f"{prefix}_valid_pad"].tolist()
    (inside,) = grid.counting([(height - 3, width)], maps)
    valid = torch.cat(per_image(data, f"{prefix}_valid"))
    assert valid.all() if inside is None else torch.equal(inside, valid)


def test_all_anchors_count_where_nothing_is_padded(grids: dict[str, AnchorGrid]) -> None:
    maps = [torch.empty(1, 1, -(-96 // stride), -(-160 // stride)) for stride in (8, 16, 32, 64, 128)]
    assert grids["retina"].counting([(96, 160), (70, 150)], maps)[0] is None
    assert grids["retina"].counting([(70, 129)], maps)[0] is None  # padded to 96 x 160 as well
    assert grids["retina"].counting([(64, 160)], maps)[0] is not None
