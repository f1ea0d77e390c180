"""Golden data of the original implementation, and models filled by its rule."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from evmamba import load_checkpoint
from evmamba.backbone import Backbone

GOLDEN = Path(__file__).parents[1] / "assets" / "golden"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def original_weights(fill: ModuleType) -> Callable[[Backbone], dict[str, Tensor]]:
    """The state dict that the original's model of the same sizes has under the golden rule, with its names."""

    def weights(model: Backbone) -> dict[str, Tensor]:
        state = model.state_dict()
        return {
            theirs: torch.from_numpy(np.array(fill.value(theirs, tuple(state[ours].shape))))
            for ours, theirs in model.original_names().items()
        }

    return weights


@pytest.fixture(scope="session")
def filled(original_weights: Callable[[Backbone], dict[str, Tensor]]) -> Callable[[Backbone], Backbone]:
    def fill_model(model: Backbone) -> Backbone:
        load_checkpoint(model, original_weights(model))
        return model

    return fill_model


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
