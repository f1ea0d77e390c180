"""Light state-space vision backbone EfficientVMamba."""

from evmamba.checkpoints import load_checkpoint, save_checkpoint
from evmamba.errors import UserError
from evmamba.model import EfficientVMamba, FeaturePyramid
from evmamba.variants import create_model, list_models

__all__ = [
    "EfficientVMamba",
    "FeaturePyramid",
    "UserError",
    "create_model",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
]
