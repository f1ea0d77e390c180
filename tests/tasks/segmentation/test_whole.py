"""Whole segmentors are counted as published."""

import pytest

from evmamba import cost
from evmamba.launch.measure.cost import count
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.segmentation.upernet import UPerNet
from evmamba.tasks.segmentation.whole import WithAuxiliary


@pytest.mark.parametrize(
    ("variant", "width", "printed", "by_hand", "parameters"),
    [("t", 256, 230, 231, 14.5), ("s", 384, 505, 506, 28.8), ("b", 512, 930, 933, 65.4)],
)
def test_upernet_counts_as_in_the_papers_table_4(variant, width, printed, by_hand, parameters):
    """The table's count is that of a prediction; the hand count has the auxiliary head, and no norms in the heads."""
    network = UPerNet(build_backbone(f"efficientvmamba_{variant}", features_only=True), 150, width)
    assert cost.count_parameters(network) / 1e6 == pytest.approx(parameters, abs=0.05)
    macs, whole = count(network, (512, 2048)), count(WithAuxiliary(network), (512, 2048))
    backbone = count(network.backbone, (512, 2048))
    assert macs.paper / 1e9 == pytest.approx(printed, rel=0.002)
    norms = sum(whole.by_op[kind] - backbone.by_op[kind] for kind in ("batch_norm", "avg_pool"))
    assert round((whole.paper - norms) / 1e9) == by_hand
