"""What classifier and pyramid share: refusals, ablations, stochastic depth, checkpointing, groups of parameters."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from evmamba import EfficientVMamba, UserError, create_model

TINY = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}


def tiny(**options) -> EfficientVMamba:
    return EfficientVMamba(**TINY, num_classes=5, **options)


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (8, 8)], ids=str)
def test_too_small_images_are_refused(size):
    with pytest.raises(UserError, match=r"at least 32x32 pixels, not \d+x\d+"):
        tiny()(torch.randn(1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64), (1, 64, 64, 3)], ids=str)
def test_wrong_channels_are_refused(shape):
    with pytest.raises(UserError, match=r"\[B, 3, H, W\].*not a tensor of shape"):
        tiny()(torch.randn(shape))


@pytest.mark.parametrize("layout", ["EEII", "EEEE", "IIEE", "IIII"])
@pytest.mark.parametrize("options", [{}, {"scan": "ss2d"}, {"fusion": False}], ids=str)
def test_ablations_train(layout, options):
    model = tiny(layout=layout, **options)
    kinds = "".join(type(stage.blocks[0]).__name__[0] for stage in model.stages)
    assert kinds == layout
    model(torch.randn(2, 3, 40, 36)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_drop_path_grows_over_all_blocks():
    model = create_model("efficientvmamba_t", drop_path_rate=0.1)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 10), atol=1e-7)


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain = tiny(drop_path_rate=0.3).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    image = torch.randn(4, 3, 64, 64)
    results = []
    for model in (plain, saving):
        torch.manual_seed(3)
        loss = model(image).square().sum()
        loss.backward()
        results.append(loss.item())
    assert results[0] == results[1]
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers(), strict=True):
        assert torch.equal(a, b), f"{name}: statistics must not be updated twice"
    momenta = {m.momentum for m in saving.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}


def test_weight_decay_exceptions_are_parameters_of_the_scan():
    model = tiny()
    names = model.no_weight_decay()
    assert {name.rsplit(".", 1)[1] for name in names} == {"A_logs", "Ds"}
    assert names <= {name for name, _ in model.named_parameters()}
