"""The compiled backward: types of its gradients, gradients that nobody wants, and states of another map."""

import pytest
import torch

from .backend_checks import check, check_alone

numba_es2d = pytest.importorskip("evmamba.kernels.numba_es2d", reason="needs numba")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["es2d", "ss2d"])
def test_half_types_lose_only_the_rounding_of_their_gradients(make_inputs, pattern, dtype):
    check(numba_es2d, make_inputs(2, 7, 10, 16, 16, 2, dtype), pattern)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels", [6, 64], ids=["one slab", "four slabs"])
@pytest.mark.parametrize("i", range(6))
def test_a_gradient_alone_is_the_same_and_the_others_are_left_out(make_inputs, i, channels):
    check_alone(numba_es2d, make_inputs(1, 5, 6, channels, 4, 2), i)


def test_states_of_another_map_are_refused(make_inputs):
    inputs = make_inputs(1, 8, 8, 16, 4, 2)
    y, states = numba_es2d.forward(*inputs, "es2d", save=True)
    with pytest.raises(ValueError, match="states must be"):
        numba_es2d.backward(y, *inputs, states[:, :, :1], "es2d")
