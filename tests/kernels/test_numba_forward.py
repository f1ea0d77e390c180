"""The compiled forward: extreme decays, what is not a number, and the states that it saves."""

import pytest
import torch

from evmamba.kernels import chunked

from .backend_checks import EXTREMES, check_extreme

numba_es2d = pytest.importorskip("evmamba.kernels.numba_es2d", reason="needs numba")


@pytest.mark.parametrize(("bias", "A_log"), EXTREMES.values(), ids=EXTREMES)
def test_extreme_decays_neither_overflow_nor_drift(make_inputs, bias, A_log):
    check_extreme(numba_es2d, make_inputs(1, 10, 10, 4, 4, 1), bias, A_log)


@pytest.mark.parametrize("argument", range(6))
def test_what_is_not_a_number_shows(make_inputs, argument):
    inputs = make_inputs(1, 4, 4, 8, 4, 2)
    inputs[argument].view(-1)[0] = float("nan")
    assert numba_es2d.forward(*inputs, "es2d", save=False)[0].isnan().any()


def test_states_are_those_of_the_pytorch_backend(make_inputs, assert_close):
    for D in (16, 6):
        inputs = make_inputs(2, 9, 12, D, 4, 2, torch.float64)
        y, states = numba_es2d.forward(*inputs, "es2d", save=True)
        y_inference, nothing = numba_es2d.forward(*inputs, "es2d", save=False)
        _, expected = chunked.forward(*inputs, "es2d", save=True)
        assert torch.equal(y, y_inference)
        assert nothing.numel() == 0
        assert_close(states, expected, 1e-13)
