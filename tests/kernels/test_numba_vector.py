"""Vectors of 16 numbers in compiled functions: their mathematics over all magnitudes, and the order of sums."""

import numpy as np
import pytest

pytest.importorskip("numba")
from numba import njit

from evmamba.kernels.numba_vector import exp2, load, row_sums, sigmoid, softplus, store

FUNCTIONS = {
    # function, its definition in extended precision, arguments, largest relative error near 0 (|v| < 15) and elsewhere
    # in units of the type's epsilon: an exponential's is as much larger as its argument
    "exp2": (exp2, lambda v: np.exp2(v), (-120.0, 0.0), 2, 2),
    "softplus": (softplus, lambda v: np.logaddexp(0, v), (-80.0, 80.0), 12, 60),
    "sigmoid": (sigmoid, lambda v: 1 / (1 + np.exp(-v)), (-80.0, 80.0), 12, 60),
}


def mapped(function):
    @njit
    def each(x, y):
        for i in range(0, x.size, 16):
            store(y, (i,), function(load(x, (i,))))

    return each


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_exact_to_the_last_bits_and_keep_nan(name, dtype):
    function, exact, bounds, near, far = FUNCTIONS[name]
    x = np.linspace(*bounds, 160_000).astype(dtype)
    y = np.empty_like(x)
    each = mapped(function)
    each(x, y)
    error = np.abs(y / exact(x.astype(np.longdouble)) - 1) / np.finfo(dtype).eps
    assert error[np.abs(x) < 15].max() < near
    assert error.max() < far
    each(np.full(16, np.nan, dtype), y)
    assert np.isnan(y[:16]).all()


def test_exp2_is_exact_where_nothing_decays_and_stays_positive_far_below():
    x = np.zeros(16, np.float32)
    x[1:] = [-1, -2, -3, -126, -130, -1e30, -np.inf, *[-1e-7] * 8]
    y = np.empty_like(x)
    mapped(exp2)(x, y)
    assert y[:4].tolist() == [1, 0.5, 0.25, 0.125]
    assert (y[4:8] == 2.0**-126).all()
    assert np.allclose(1 - y[8:], 1e-7 * np.log(2), rtol=0.2, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_summed_halves_onto_halves(dtype):
    @njit
    def sums(rows, out):
        store(out, (0,), row_sums(rows, (0, 0)))

    rows = np.random.default_rng(0).standard_normal((16, 16)).astype(dtype)
    out = np.empty(16, dtype)
    sums(rows, out)
    expected = rows
    while expected.shape[1] > 1:
        half = expected.shape[1] // 2
        expected = expected[:, :half] + expected[:, half:]
    assert np.array_equal(out, expected[:, 0])
