"""The products around the Triton scan: index tables, input projections and their gradients."""

import pytest
import torch

from evmamba.kernels import reference
from evmamba.kernels.paths import PATTERNS, scan_paths

from .triton_runs import DEVICE, INTERPRETED, MARKS, RUNNABLE, check

if RUNNABLE:
    from evmamba.kernels import triton_es2d
    from evmamba.kernels.tuning import Tuning

    from . import scan_cases

pytestmark = [*MARKS, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (4, 7), (6, 4)], ids=str)
def test_table_holds_the_paths_and_padding_to_read_ahead(size, pattern):
    paths = scan_paths(*size, pattern)
    table = triton_es2d.path_table(*size, pattern, torch.device(DEVICE), 48).cpu()
    assert torch.equal(table[:-1, : paths.shape[1]], paths)
    assert (table[:-1, paths.shape[1] :] == -1).all()
    assert (table[-1] == -1).all()


def test_weight_gradient_of_few_splits():
    check((1, 1, 150, 8, 2, 1), "forward", tuning=Tuning(weight_gradient_splits=1))


def test_projection_weights_are_rounded_to_the_maps_type():
    # float16: the interpreter truncates to bfloat16, which would be another weight.
    check((1, 3, 5, 8, 2, 2), "es2d", torch.float16, steps="unrounded")


@pytest.mark.skipif(not INTERPRETED, reason="tensor cores round too: tf32")
def test_dx_comes_from_the_weights_that_the_forward_multiplied_by():
    dtype = torch.float16  # the interpreter truncates to bfloat16
    x, *parameters = scan_cases.make_inputs((1, 3, 5, 8, 2, 2), "es2d", dtype, "small")
    call = triton_es2d._prepare(x, *parameters, "es2d", Tuning())
    K, M, N, R = 4, call.product.M, 2, 2
    dproj = torch.randn(1, K, M, 8, generator=torch.Generator().manual_seed(1))
    dx = triton_es2d._input_gradient(call, dproj.view(1, K * M, 8), torch.zeros(1, *x.shape))
    # Columns of dproj: B and C in pairs, then the rank.
    d_bc, d_low = dproj[0, ..., : 2 * N].unflatten(-1, (N, 2)), dproj[0, ..., 2 * N : 2 * N + R]
    columns = torch.cat([d_low, d_bc[..., 0], d_bc[..., 1]], dim=-1)
    rounded = parameters[0].to(dtype).float()
    paths = scan_paths(3, 5, "es2d")
    L = paths.shape[1]
    expected = reference.merge_tokens((columns[:, :L] @ rounded)[None], paths, 3, 5)
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=1e-6)
