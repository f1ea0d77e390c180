"""Inputs, golden data and tolerances that all kernel tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "assets" / "golden"
PARAMETERS = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")

# Largest error relative to the largest value, against the float64 definition of the same (rounded) inputs. The map
# comes in the scan's type, a gradient in its input's: half types round it to 8 or 11 bits of mantissa.
MAP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    """Arrays of a golden file by name, as tensors."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture
def make_inputs() -> Callable[..., list[Tensor]]:
    """A map and the five parameters, drawn like those of a trained network; parameters in the map's type."""

    def make(B: int, H: int, W: int, D: int, N: int, R: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(B + 10 * H + 100 * W + 1000 * D + N + R)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        inputs = (
            normal(B, H, W, D),
            normal(4, R + 2 * N, D) / D**0.5,
            normal(4, D, R) / R**0.5,
            0.5 * normal(4, D) - 2,
            torch.arange(1, N + 1).log() + 0.1 * normal(4 * D, N),
            1 + 0.1 * normal(4 * D),
        )
        return [tensor.to(dtype) for tensor in inputs]

    return make


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest error is at most `tolerance` times the largest expected value."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max().item()
        assert error <= tolerance * expected.abs().max().item()


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor, float], None]:
    return close


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gradient_tolerance() -> dict[torch.dtype, float]:
    return GRADIENT_TOLERANCE


@pytest.fixture
def golden_case(golden) -> Callable[[str, str, torch.dtype], dict[str, Tensor]]:
    """One size of the original's ES2D or SS2D: inputs, channels last, and what the original made of them."""

    def load(pattern: str, size: str, dtype: torch.dtype) -> dict[str, Tensor]:
        es2d = golden("op_cross_scan")
        data = es2d if pattern == "es2d" else golden("op_cross_scan_vmamba")
        case = {name: es2d[name].to(dtype) for name in (*PARAMETERS, "out_norm_weight", "out_norm_bias")}
        case |= {key.removeprefix(f"{size}_"): data[key].to(dtype) for key in data if key.startswith(f"{size}_")}
        case["x"] = case["x"].permute(0, 2, 3, 1)
        if "grad_x" in case:
            case["grad_x"] = case["grad_x"].permute(0, 2, 3, 1)
        return case

    return load


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The emulator's longer set runs only where it is asked for."""
    if "slow_emulator" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow_emulator"):
                item.add_marker(pytest.mark.skip(reason="asked for with -m slow_emulator"))
