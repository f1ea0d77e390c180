"""The Triton forward: states, and sequences cut into segments."""

import pytest
import torch

from evmamba.kernels import reference

from .triton_runs import MARKS, RUNNABLE, Y_TOLERANCE, check, make_inputs

if RUNNABLE:
    from evmamba.kernels import triton_es2d
    from evmamba.kernels.tuning import Tuning

    from .scan_cases import relative_error

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("N", [1, 5, 8, 32, 64])
def test_any_number_of_states(N):
    check((1, 1, 3, 8, N, 2), "forward")


@pytest.mark.parametrize("pattern", ["forward", "reverse"])
def test_segments_equal_one_long_scan(pattern):
    short = Tuning(shortest_segment=16)
    assert triton_es2d.plan(1, 8, 39, 1, short).segments == 3
    check((1, 1, 39, 8, 2, 1), pattern, tuning=short)


def test_state_survives_a_long_sequence():
    inputs = make_inputs(1, 1, 150, 8, 2, 1, "forward")
    expected = reference.scan(*(t.double().cpu() for t in inputs), "forward")
    y, _ = triton_es2d.forward(*inputs, "forward", save=False)
    assert relative_error(y, expected) < Y_TOLERANCE[torch.float32]
