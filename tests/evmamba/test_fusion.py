"""Networks with folded BatchNorms give the original's values, and leave the network that they were made of alone."""

import numpy as np
import pytest
import torch
from torch import nn

from evmamba import UserError, create_model, fuse


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=str)
def test_fused_logits_equal_the_original(golden, filled, dtype, tolerance):
    arrays = golden("logits_t_212x148")
    model = filled(create_model("efficientvmamba_t")).eval().to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    with torch.no_grad():
        logits = fused(torch.from_numpy(arrays["x"]).to(dtype)).double().numpy()
    assert np.abs(logits - arrays["logits_f64"]).max() <= tolerance
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_detector_around_the_network_is_fused_too_and_twice_is_once(filled):
    pyramid = filled(create_model("efficientvmamba_t", features_only=True))
    around = nn.Sequential(pyramid).eval()
    once = fuse(around)
    twice = fuse(once)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in once.modules())
    assert once.state_dict().keys() == twice.state_dict().keys()


def test_a_network_in_training_is_refused():
    with pytest.raises(UserError, match="eval"):
        fuse(create_model("efficientvmamba_t", num_classes=2))


def test_weights_are_cast_once_and_those_of_the_scan_and_of_norms_are_not(filled):
    model = filled(create_model("efficientvmamba_t")).eval()
    fused = fuse(model, torch.bfloat16)
    wide = {name.split(".")[-2] for name, value in fused.named_parameters() if value.dtype == torch.float32}
    assert wide == {"global_branch", "norm", "out_norm"}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = model(image), fused(image.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.05 * expected.norm()
