"""The Triton kernels' softplus and exponentials over the step sizes that networks have."""

import pytest

from evmamba.kernels import reference

from .triton_runs import MARKS, RUNNABLE, check, make_inputs

if RUNNABLE:
    from evmamba.kernels import triton_es2d

    from .scan_cases import relative_error

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("steps", ["small", "large"])
def test_step_sizes_as_networks_have_them(steps):
    check((1, 3, 5, 8, 4, 2), "es2d", steps=steps)


def test_large_step_sizes_do_not_overflow():
    inputs = make_inputs(1, 3, 3, 8, 4, 2, "es2d")
    inputs[3] = inputs[3] + 90  # softplus(90) = 90, exp(90) is beyond float32
    expected = reference.scan(*(t.double().cpu() for t in inputs), "es2d")
    assert relative_error(triton_es2d.forward(*inputs, "es2d", save=False)[0], expected) < 1e-5
