"""Deterministic values for parameters, buffers and images, by which the golden files of this folder were made.

Every parameter has a generator of its own, seeded by the crc32 of its name in the original implementation, so neither
the order of the parameters nor our names matter. `fill_check.json` holds values to check a changed numpy against.
"""

import math
import zlib

import numpy as np

LOG_DECAYS = ("A_logs", "A_log", "A_b_log")
SKIPS = ("Ds", "D", "D_b")
STEP_BIASES = ("dt_projs_bias", "dt_proj.bias", "dt_proj_b.bias")
TOKENS = ("cls_token", "pos_embed")
STACKED = ("x_proj_weight", "dt_projs_weight")


def value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of one entry of the original's state_dict: float32, int64 for num_batches_tracked."""

    def is_one_of(names: tuple[str, ...]) -> bool:
        return any(key == name or key.endswith(f".{name}") for name in names)

    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    noise = np.asarray(np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape))
    if last == "running_var":
        filled = 1.0 + 0.25 * np.abs(noise)
    elif last == "running_mean":
        filled = 0.1 * noise
    elif is_one_of(LOG_DECAYS):
        filled = np.log(np.arange(1, shape[-1] + 1, dtype=np.float64)) + 0.1 * noise
    elif is_one_of(SKIPS):
        filled = 1.0 + 0.1 * noise
    elif is_one_of(STEP_BIASES):
        filled = -3.0 + 0.5 * noise
    elif is_one_of(TOKENS):
        filled = 0.2 * noise
    elif len(shape) == 1:
        filled = 1.0 + 0.1 * noise if last == "weight" else 0.05 * noise
    else:
        filled = noise / math.sqrt(shape[-1] if is_one_of(STACKED) else math.prod(shape[1:]))
    return filled.astype(np.float32)


def image(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 input of multiples of 1/64."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (np.rint(64.0 * noise) / 64.0).astype(np.float32)
