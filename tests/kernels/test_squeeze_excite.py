"""The tail of an EVSS block: a block that takes kernels asks for one operator, and means the same by it."""

import pytest
import torch

from evmamba.blocks import EVSSBlock
from evmamba.kernels import squeeze_excite

pytest.importorskip("triton")
from .squeeze_cases import definition


@pytest.fixture
def with_the_definition(monkeypatch):
    """Blocks take the path of GPUs, with the definition in place of the kernels."""

    def forward(x, u, v, *parameters_keep_eps):
        *parameters, keep, eps = parameters_keep_eps
        assert eps == 1e-5
        empty = x.new_empty(len(x), 2, x.shape[-1])
        return definition(x, u, v, *parameters, keep=keep), empty, empty

    # Of all that has kernels only the tail asks with its channels; the layers before it stay modules.
    monkeypatch.setattr("evmamba.blocks.has_kernels", lambda x, channels=0: channels > 0)
    monkeypatch.setattr(squeeze_excite, "fused_squeeze_excite_add", forward)


@pytest.mark.parametrize("training", [False, True])
def test_a_block_with_kernels_computes_what_its_modules_do(training, with_the_definition, monkeypatch):
    block = EVSSBlock(16, drop_path=0.5).train(training)
    x = torch.randn(4, 5, 6, 16)
    torch.manual_seed(1)
    with_operator = block(x)
    torch.manual_seed(1)
    monkeypatch.setattr("evmamba.blocks.has_kernels", lambda x, channels=0: False)
    torch.testing.assert_close(with_operator, block(x))
