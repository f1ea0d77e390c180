"""A curve ends where its network cannot be measured any more, and says why."""

from typing import Any

import pytest
import torch

from evmamba.launch.store.sweeps import sweep


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
        (RuntimeError("shape mismatch\nmore"), "shape mismatch"),
    ],
    ids=str,
)
def test_a_sweep_ends_with_its_reason_at_what_cannot_be_measured(error, reason):
    def measure_one(value: int) -> dict[str, Any]:
        if value > 2:
            raise error
        return {"images_per_s": 1.0}

    points = sweep("batch_size", [1, 2, 4, 8], measure_one)
    assert [point["batch_size"] for point in points] == [1, 2, 4]
    assert points[-1] == {"batch_size": 4, "failed": reason}
