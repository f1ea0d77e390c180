"""The Triton recurrence against the float64 definition, in all gradients.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import pytest
import torch

from .triton_runs import DEVICE, MARKS, RUNNABLE

if RUNNABLE:
    from evmamba.kernels import chunked_selective_scan, triton_selective_scan

pytestmark = MARKS
NAMES = ("y", "last_state", "du", "d_delta", "dA", "dB", "dC")
TOLERANCE = 3e-6


def inputs(batch: int, channels: int, L: int, N: int, G: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, channels, L), (batch, channels, L), (channels, N), (batch, G, N, L), (batch, G, N, L))
    u, delta, A, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    return [u, 0.3 * delta.abs(), -A.exp(), B, C]


def run(backend, given: list[torch.Tensor], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    placed = [t.to(device, dtype) for t in given]
    y, last, states = backend.forward(*placed, save=True)
    generator = torch.Generator().manual_seed(1)
    dy, d_last = (torch.randn(t.shape, generator=generator).to(device, dtype) for t in (y, last))
    assert states.shape == backend.states_shape(*placed[0].shape, *placed[3].shape[2:0:-1])
    return [y, last, *backend.backward(dy, d_last, *placed, states)]


def check(given: list[torch.Tensor]) -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN: an element that no kernel wrote shows
    try:
        found = run(triton_selective_scan, given, DEVICE, torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = run(chunked_selective_scan, given, "cpu", torch.float64)
    for name, value, target in zip(NAMES, found, expected, strict=True):
        assert value.shape == target.shape, name
        error = (value.cpu().double() - target).norm().item()
        assert error <= TOLERANCE * target.norm().item(), (name, error)


@pytest.mark.parametrize(
    "size",
    # batch, channels, L, N, G
    [
        pytest.param((1, 1, 1, 1, 1), id="one of all"),
        pytest.param((2, 3, 9, 5, 1), id="states that are no power of two"),
        pytest.param((1, 2, 17, 128, 1), id="three tiles, odd"),
        pytest.param((1, 20, 8, 2, 1), id="two programs of a group"),
        pytest.param((2, 6, 9, 4, 3), id="groups"),
    ],
)
def test_the_recurrence_equals_the_definition(size: tuple[int, ...]):
    check(inputs(*size))


def test_b_and_c_of_any_strides():
    u, delta, A, B, _ = inputs(2, 4, 9, 3, 4)
    constant = B[:1, :, :, :1].expand(2, -1, -1, 9)
    check([u, delta, A, constant, B.mT.contiguous().mT])
