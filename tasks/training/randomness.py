"""Random numbers that depend on what they are for, not on what was drawn before.

An augmentation depends on (seed, epoch, image), a training step on (seed, epoch, batch, rank). So neither the number of
loading processes nor an interruption changes a training.
"""

import random

import numpy as np
import torch
from torch.utils.data import Dataset

# First number of every key, so that an image and a step with the same numbers do not share their randomness.
_SAMPLE, _STEP = 0, 1


class SeededSamples(Dataset):
    """A training set under keys (epoch, index), with torch, numpy and Python seeded anew for every sample.

    Args:
        samples: map-style data set whose transforms draw from the global generators.
        seed: the data's seed.
    """

    def __init__(self, samples: Dataset, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> object:
        epoch, index = key
        # Not torch.manual_seed, which also seeds every device and costs ten times as much.
        torch.default_generator.manual_seed(_seed_numpy_and_python(_SAMPLE, self.seed, epoch, index))
        return self.samples[index]


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed all generators, devices included, for one training step of one process (dropout, drop path, mixup)."""
    torch.manual_seed(_seed_numpy_and_python(_STEP, seed, epoch, batch, rank))


def _seed_numpy_and_python(*key: int) -> int:
    """Seed the two and return a seed for torch."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(key).generate_state(3).tolist()
    np.random.seed(for_numpy)
    random.seed(for_python)
    return for_torch
