"""The published network's recipe, which the benchmark compares with."""

import torch

from evmamba.kernels import reference
from evmamba.launch.measure import kernel_bench as bench
from evmamba.launch.measure.original import original_es2d


def test_original_recipe_computes_the_definition():
    for H, W in ((4, 6), (5, 7)):
        shape = bench.Shape("small", 2, H, W, 8, 2)
        ours, theirs = (bench.make_inputs(shape, torch.device("cpu"), torch.float32) for _ in range(2))
        y, expected = original_es2d(*theirs), reference.scan(*ours, "es2d")
        torch.testing.assert_close(y, expected)
        dy = torch.randn_like(y)
        for got, wanted in zip(
            torch.autograd.grad(y, theirs, dy), torch.autograd.grad(expected, ours, dy), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
