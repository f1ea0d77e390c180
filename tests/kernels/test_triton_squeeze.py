"""The fused tail of EVSS blocks against PyTorch in float64.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import pytest
import torch

from .triton_runs import DEVICE, INTERPRETED, MARKS, on_test_device

pytestmark = MARKS
# The interpreter truncates to bfloat16 where hardware rounds.
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(poisoned_memory, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize(
    ("size", "drop"),
    [
        pytest.param((2, 19, 17, 12), True, id="several programs a map"),
        pytest.param((1, 1, 1, 8), False, id="one pixel"),
        pytest.param((3, 3, 5, 40), False, id="odd map"),
    ],
)
def test_tail_equals_pytorch(size, drop, dtype):
    from .squeeze_cases import errors

    found = errors(size, dtype, on_test_device, drop=drop)
    limits = {name: ROUNDED[dtype] if name in ("u", "v") else 3e-6 for name in found}
    assert {name: error for name, error in found.items() if not error < limits[name]} == {}


def test_public_function_and_its_gradients_equal_pytorch():
    from evmamba.kernels.squeeze_excite import squeeze_excite_add

    from .scan_cases import relative_error
    from .squeeze_cases import definition, make_inputs

    inputs = [t.to(DEVICE).requires_grad_() for t in make_inputs((2, 3, 3, 8), torch.float32)]
    exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    out, expected = squeeze_excite_add(*inputs), definition(*exact, keep=None)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert relative_error(out.detach(), expected.detach()) < 1e-6
    assert all(relative_error(t.grad, e.grad) < 3e-6 for t, e in zip(inputs, exact, strict=True))


def test_operators_follow_the_library_rules():
    from evmamba.kernels.squeeze_excite import branch_gradients, fused_squeeze_excite_add, gate_gradients

    from .squeeze_cases import make_inputs

    torch.use_deterministic_algorithms(False)  # opcheck compares two runs and takes NaN for a difference
    inputs = [t.to(DEVICE).requires_grad_() for t in make_inputs((2, 3, 2, 8), torch.float32)]
    keep = torch.tensor([0.0, 2.0], device=DEVICE)
    torch.library.opcheck(fused_squeeze_excite_add, (*inputs, keep, 1e-5))
    maps = [t.detach() for t in inputs[:3]]
    means = torch.randn(2, 2, 8, device=DEVICE)
    torch.library.opcheck(gate_gradients, maps)
    torch.library.opcheck(branch_gradients, (*maps, means, means, 1e-5))


def test_empty_batch():
    from evmamba.kernels.squeeze_excite import squeeze_excite_add

    from .squeeze_cases import make_inputs

    inputs = [t.to(DEVICE).requires_grad_() for t in make_inputs((0, 4, 4, 8), torch.float32)]
    out = squeeze_excite_add(*inputs)
    assert out.shape == (0, 4, 4, 8)
    out.sum().backward()
    assert all((t.grad == 0).all() for t in inputs)
