"""The operator behind `convolved_scan` against the definition in float64, and what it keeps for its backward.

Needs a GPU, or Triton's interpreter: test_triton_interpreter.py runs this file there.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from evmamba.kernels import convolved_scan, reference

from .triton_runs import DEVICE, MARKS, make_inputs

pytestmark = MARKS


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(poisoned_memory, monkeypatch):
    monkeypatch.setenv("EVMAMBA_BACKEND", "triton")


def draw(pattern):
    """x (half of a wider map), weight and bias of the convolution, and the scan's parameters."""
    x, *parameters = make_inputs(1, 2, 3, 8, 2, 1, pattern)
    generator = torch.Generator().manual_seed(1)
    convolution = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((8, 1, 3, 3), (8,)))
    return [t.requires_grad_() for t in (torch.cat((x, x), dim=-1).chunk(2, dim=-1)[1], *convolution, *parameters)]


def test_operator_and_gradients_equal_the_definition_and_the_convolution_is_not_kept():
    from .scan_cases import relative_error

    inputs = draw("es2d")
    y = convolved_scan(*inputs, "es2d")
    saved = [t for t in y.grad_fn.saved_tensors if t.shape == y.shape]
    assert [t.data_ptr() for t in saved] == [inputs[0].data_ptr()]
    gradients = torch.autograd.grad(y.square().sum(), inputs)

    x, weight, bias, *parameters = exact = [t.detach().double().cpu().requires_grad_() for t in inputs]
    signal = F.silu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=8)).permute(0, 2, 3, 1)
    expected = reference.scan(signal, *parameters, "es2d")
    wanted = torch.autograd.grad(expected.square().sum(), exact)
    errors = [relative_error(d, e) for d, e in zip((y.detach(), *gradients), (expected.detach(), *wanted), strict=True)]
    assert max(errors) < 1e-5, errors


def test_a_checkpoint_gives_the_same_and_one_gradient_comes_alone():
    inputs = draw("forward")
    every = torch.autograd.grad(convolved_scan(*inputs, "forward").sum(), inputs)
    bias = [t.detach().requires_grad_(i == 2) for i, t in enumerate(inputs)]
    checkpoint(convolved_scan, *bias, "forward", use_reentrant=False).sum().backward()
    assert torch.equal(bias[2].grad, every[2])
    assert [i for i, t in enumerate(bias) if t.grad is not None] == [2]


def test_a_gradient_has_no_gradient():
    x, *rest = draw("forward")
    (dx,) = torch.autograd.grad(convolved_scan(x, *rest, "forward").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_operator_keeps_the_rules_of_torch_library():
    from evmamba.kernels.convolved_scan import convolved_scan_train

    torch.use_deterministic_algorithms(False)  # opcheck compares two runs and takes NaN for a difference
    x, weight, _, *parameters = [t.detach().requires_grad_() for t in draw("forward")]
    torch.library.opcheck(convolved_scan_train, (x, weight, None, *parameters, "forward"))
