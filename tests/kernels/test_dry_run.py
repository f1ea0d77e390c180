"""A dry run notes every launch, needs no GPU, computes nothing and leaves no trace behind it."""

import pytest
import torch

from evmamba.kernels import es2d_scan
from evmamba.kernels.ops import backend_name

pytest.importorskip("triton")
from evmamba.kernels import triton_es2d
from evmamba.kernels.dry_run import dry_run


def test_launches_are_noted_with_their_tensors_and_not_run():
    shapes = ((2, 4, 4, 8), (4, 5, 8), (4, 8, 1), (4, 8), (32, 2), (32,))
    x, *parameters = (torch.empty(shape, device="meta") for shape in shapes)
    noted = []
    with dry_run(lambda kernel, tensors: noted.append((kernel, [t.data_ptr() for t in tensors]))):
        assert backend_name("cpu", torch.float32) == "triton"
        y, _ = triton_es2d.forward(x, *parameters, "es2d", save=False)
    assert [kernel for kernel, _ in noted] == ["paths_kernel", "decay_kernel", "project_kernel", "scan_forward_kernel"]
    assert y.shape == x.shape
    assert backend_name("cpu", torch.float32) != "triton"
    assert es2d_scan(*(torch.zeros(shape) for shape in shapes)).abs().sum() == 0
