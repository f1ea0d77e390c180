"""The recurrence by PyTorch's operators: chunks, blocks of the batch and every written element."""

import pytest
import torch

from evmamba.kernels import chunked
from evmamba.kernels.chunked_selective_scan import backward, forward, states_shape

SHAPE = (3, 6, 35, 2, 2)  # batch, channels, L, N, G


def inputs() -> list[torch.Tensor]:
    batch, channels, L, N, G = SHAPE
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, L), (batch, channels, L), (channels, N), (batch, G, N, L), (batch, G, N, L))
    u, delta, A, B, C = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [u, delta.abs(), -A.abs(), B, C]


def test_saved_states_have_the_shape_that_is_told():
    y, last, states = forward(*inputs(), save=True)
    assert states.shape == states_shape(*SHAPE)
    again, last_again, none = forward(*inputs(), save=False)
    assert torch.equal(y, again)
    assert torch.equal(last, last_again)
    assert none.numel() == 0


@pytest.mark.usefixtures("poisoned_memory")
def test_cutting_the_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    def run() -> list[torch.Tensor]:
        given = inputs()
        y, last, states = forward(*given, save=True)
        return [y, last, *backward(torch.ones_like(y), torch.ones_like(last), *given, states)]

    whole = run()
    monkeypatch.setattr(chunked, "BLOCK", 1)
    for one, other in zip(whole, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
