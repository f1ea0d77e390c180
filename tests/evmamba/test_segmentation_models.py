"""segmentation_models_pytorch builds its networks on ours, through timm's registry."""

import pytest
import torch

import evmamba

smp = pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize("architecture", ["Unet", "FPN", "UPerNet"])
def test_our_backbone_is_an_encoder(architecture: str):
    torch.manual_seed(0)
    network = getattr(smp, architecture)("tu-efficientvmamba_t", encoder_weights=None, classes=4)
    assert isinstance(network.encoder.model, evmamba.FeaturePyramid)
    image = torch.randn(2, 3, 64, 96)
    scores = network(image)
    assert scores.shape == (2, 4, 64, 96)
    scores.square().mean().backward()
    gradients = [p.grad for name, p in network.encoder.named_parameters() if name.endswith("A_logs")]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
