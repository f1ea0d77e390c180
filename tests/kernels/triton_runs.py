"""What the tests share that run Triton kernels: on a GPU, or in Triton's interpreter.

The interpreter is chosen before triton is imported: test_triton_interpreter.py runs every file that imports this one in
a process of its own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNNABLE = INTERPRETED or torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.skipif(not RUNNABLE, reason="needs a GPU or TRITON_INTERPRET=1"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
if RUNNABLE:
    from . import scan_cases

# Error relative to the definition's norm. dx is rounded twice to x's type, and the interpreter truncates to bfloat16.
Y_TOLERANCE = {torch.float32: 1e-6 if INTERPRETED else 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_TOLERANCE = {
    torch.float32: 1e-6 if INTERPRETED else 1e-5,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-10,
}


def on_test_device(tensor):
    return tensor.to(DEVICE)


def make_inputs(*size_and_pattern, dtype=torch.float32):
    """`scan_cases.make_inputs` on the device: B, H, W, D, N, R, pattern."""
    *size, pattern = size_and_pattern
    return [t.to(DEVICE) for t in scan_cases.make_inputs(tuple(size), pattern, dtype)]


def check(size, pattern, dtype=torch.float32, steps="ordinary", tuning=None):
    """The scan and all its gradients against the definition."""
    errors = scan_cases.errors(size, pattern, dtype, steps, on_test_device, tuning)
    assert errors.pop("y") < Y_TOLERANCE[dtype]
    assert all(error < GRADIENT_TOLERANCE[dtype] for error in errors.values()), errors
