"""The Triton backward: sums over channels on tensor cores, and gradients that nobody wants."""

import numpy as np
import pytest
import torch

from .triton_runs import INTERPRETED, MARKS, RUNNABLE, check, make_inputs

if RUNNABLE:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from evmamba.kernels import triton_backward, triton_es2d
    from evmamba.kernels.tuning import Tuning


pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]


def matrix_product_of_a_warp(even, odd, select_even, select_odd, sums):
    """mma.sync.m16n8k8 for the interpreter, by the PTX manual's layout of its operands over the lanes."""
    values = [t.handle.data for t in (*even, *odd, select_even, select_odd, *sums)]
    lane = np.arange(32)
    row, column = lane // 4, lane % 4
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    a[row, column], a[row + 8, column], a[row, column + 4], a[row + 8, column + 4] = values[:4]
    b[column, row], b[column + 4, row] = values[4:6]
    places = [(row, 2 * column), (row, 2 * column + 1), (row + 8, 2 * column), (row + 8, 2 * column + 1)]
    for place, value in zip(places, values[6:], strict=True):
        c[place] = value
    d = (a @ b + c).astype(np.float32)
    return tl.tuple([tl.tensor(TensorHandle(d[p], tl.float32), sums[0].type) for p in places])


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the instruction itself")
@pytest.mark.parametrize("shape", [(1, 7, 5, 8, 4, 3), (1, 3, 3, 40, 4, 1)], ids=str)
def test_sums_over_channels_on_tensor_cores_equal_the_definition(shape, monkeypatch):
    monkeypatch.setattr(triton_backward, "add_lanes", matrix_product_of_a_warp)
    check(shape, "es2d", tuning=Tuning(tensor_cores=True))


@pytest.mark.parametrize("chosen", [(0,), (1,), (2, 4), (3, 5)], ids=str)
def test_some_gradients_alone_are_the_same(chosen):
    inputs = make_inputs(1, 3, 3, 8, 2, 2, "es2d")
    y, states = triton_es2d.forward(*inputs, "es2d", save=True)
    every = triton_es2d.backward(y, *inputs, states, "es2d")
    some = triton_es2d.backward(y, *inputs, states, "es2d", [i in chosen for i in range(6)])
    assert [i for i, gradient in enumerate(some) if gradient is not None] == list(chosen)
    assert all(torch.equal(some[i], every[i]) for i in chosen)
