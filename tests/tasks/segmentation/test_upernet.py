import pytest
import torch
from torch import nn

from evmamba.cost import count_macs
from evmamba.tasks.backbones import build_backbone
from evmamba.tasks.segmentation.upernet import RegionPool, UPerNet


@pytest.mark.parametrize(
    ("variant", "channels", "parameters"),
    [("t", 256, 14_487_488), ("s", 384, 28_783_516), ("b", 512, 65_370_644)],
)
def test_parameters_are_those_of_table_4(variant: str, channels: int, parameters: int):
    """The paper prints 14, 29 and 65 M."""
    net = UPerNet(build_backbone(f"efficientvmamba_{variant}", features_only=True), 150, channels)
    assert sum(p.numel() for p in net.parameters()) == parameters


class WithAuxiliary(nn.Module):
    def __init__(self, net: UPerNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.net.forward_with_auxiliary(image)[1]


def test_macs_are_those_of_table_4():
    """The paper prints 230 G for T at 512x2048, auxiliary head included; counted here on a sixteenth of the area."""
    net = UPerNet(build_backbone("efficientvmamba_t", features_only=True), 150, 256).eval()
    assert 16 * count_macs(net, (3, 128, 512)).paper == pytest.approx(229.6e9, rel=2e-3)
    assert 16 * count_macs(WithAuxiliary(net), (3, 128, 512)).paper == pytest.approx(231.5e9, rel=2e-3)


@pytest.mark.parametrize("backbone", ["efficientvmamba_t", "resnet18"])
@pytest.mark.parametrize("size", [(64, 96), (75, 61), (33, 32)])
def test_any_size_gives_scores_at_stride_4(backbone: str, size: tuple[int, int]):
    net = UPerNet(build_backbone(backbone, features_only=True), 5, 16, 16).eval()
    with torch.inference_mode():
        scores, auxiliary = net.forward_with_auxiliary(torch.randn(1, 3, *size))
        assert torch.equal(scores, net(torch.zeros(1, 3, *size)) * 0 + scores)  # same shape, finite
    assert auxiliary is not None
    for out, stride in ((scores, 4), (auxiliary, 16)):
        assert out.shape[:2] == (1, 5)
        assert all(abs(n - side / stride) <= 1 for n, side in zip(out.shape[-2:], size, strict=True))


def test_every_parameter_gets_a_gradient():
    net = UPerNet(build_backbone("resnet18", features_only=True), 5, 16, 16)
    scores, auxiliary = net.forward_with_auxiliary(torch.randn(2, 3, 64, 64))
    assert auxiliary is not None
    (scores.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_auxiliary_head_can_be_left_out():
    net = UPerNet(build_backbone("resnet18", features_only=True), 5, 16, aux_channels=0)
    assert net.forward_with_auxiliary(torch.randn(2, 3, 64, 64))[1] is None
    assert not [name for name, _ in net.named_parameters() if name.startswith("auxiliary")]


@pytest.mark.parametrize("regions", [1, 2, 3, 6])
def test_exported_averages_over_regions_fit_any_size(regions: int):
    pool = RegionPool(regions)
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(pool, (torch.zeros(1, 2, 9, 13),), dynamic_shapes=(dynamic,)).module()
    for size in ((7, 12), (6, 6), (2, 31), (5, 4)):
        x = torch.randn(1, 2, *size, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(program(x), pool(x), rtol=0, atol=1e-6)
