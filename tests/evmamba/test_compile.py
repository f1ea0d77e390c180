"""torch.compile: the whole network is one graph, and inductor's code gives the same numbers, forward and backward."""

import copy
import shutil

import pytest
import torch

from evmamba import EfficientVMamba

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


@pytest.mark.slow
def test_inductor_trains_and_infers_as_eager_does():
    torch.manual_seed(0)
    model = EfficientVMamba(dims=(8, 16), depths=(1, 1), layout="EI", num_classes=5).train()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    image, labels = torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 3])
    for step in (model, compiled):
        torch.nn.functional.cross_entropy(step(image), labels).backward()
    for (name, expected), parameter in zip(model.named_parameters(), other.parameters(), strict=True):
        error, size = (parameter.grad - expected.grad).abs().max(), expected.grad.abs().max()
        # A bias before BatchNorm has no gradient, only what rounding leaves of it.
        assert error <= 1e-3 * size + 1e-6, (name, error, size)
    for (name, expected), buffer in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=lambda m, n=name: f"{n}: {m}")
    model.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
