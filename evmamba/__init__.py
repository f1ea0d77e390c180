"""Light state-space vision backbone EfficientVMamba.

Importing it takes neither torch nor timm along, so that `evmamba --help` answers at once: the names below are looked up
where they are first used (PEP 562). What other libraries find without being told, the models in timm's registry and the
scan among torch's operators, follows those libraries (`evmamba.registration`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from evmamba import registration
from evmamba.errors import UserError

if TYPE_CHECKING:
    from evmamba.checkpoints import load_checkpoint, save_checkpoint
    from evmamba.fusion import fuse
    from evmamba.model import EfficientVMamba, FeaturePyramid
    from evmamba.variants import create_model, list_models

__all__ = [
    "EfficientVMamba",
    "FeaturePyramid",
    "UserError",
    "create_model",
    "fuse",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]

_MODULES = {
    "EfficientVMamba": "evmamba.model",
    "FeaturePyramid": "evmamba.model",
    "create_model": "evmamba.variants",
    "fuse": "evmamba.fusion",
    "list_models": "evmamba.variants",
    "load_checkpoint": "evmamba.checkpoints",
    "save_checkpoint": "evmamba.checkpoints",
    # Above this floor: nothing here imports it; whoever asks for the name does.
    "train": "evmamba.launch.bench.finetune",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'evmamba' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.follow("torch", "evmamba.kernels")
registration.follow("timm", "evmamba.timm_models")
