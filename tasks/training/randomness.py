"""Random numbers that depend on what they are for, not on what was drawn before.

An augmentation depends on (seed, epoch, image), a training step on (seed, epoch, batch, rank). So neither the number of
loading processes nor an interruption changes a training.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

# First number of every key, so that an image and a step with the same numbers do not share their randomness.
_SAMPLE, _STEP = 0, 1
# Samples that are begun before the first is finished: 8, 32 and 64 gave no more of them a second (ImageNet's recipe).
TOGETHER = 16


class InTwoParts(Dataset, ABC):
    """Samples of which all that is drawn is drawn first, so that the rest can be done to several at once."""

    @abstractmethod
    def begin(self, index: int) -> Any:
        """What `finish` needs of a sample."""

    @abstractmethod
    def finish(self, begun: Sequence[Any]) -> list[Any]:
        """The samples; nothing is drawn any more."""

    def __getitem__(self, index: int) -> Any:
        (sample,) = self.finish([self.begin(index)])
        return sample


class SeededSamples(Dataset):
    """A training set under keys (epoch, index), with torch, numpy and Python seeded anew for every sample.

    Args:
        samples: map-style data set whose transforms draw from the global generators; a batch of one that is
            `InTwoParts` is made `TOGETHER` at a time.
        seed: the data's seed.
    """

    def __init__(self, samples: Dataset, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int]) -> object:
        self._seed(*key)
        return self.samples[key[1]]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[object]:
        """A batch, as PyTorch's loaders ask for it."""
        if not isinstance(self.samples, InTwoParts):
            return [self[key] for key in keys]
        found = []
        for start in range(0, len(keys), TOGETHER):
            begun = []
            for epoch, index in keys[start : start + TOGETHER]:
                self._seed(epoch, index)
                begun.append(self.samples.begin(index))
            found += self.samples.finish(begun)
        return found

    def _seed(self, epoch: int, index: int) -> None:
        # Not torch.manual_seed, which also seeds every device and costs ten times as much.
        torch.default_generator.manual_seed(_seed_numpy_and_python(_SAMPLE, self.seed, epoch, index))


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed all generators, devices included, for one training step of one process (dropout, drop path, mixup)."""
    torch.manual_seed(_seed_numpy_and_python(_STEP, seed, epoch, batch, rank))


def _seed_numpy_and_python(*key: int) -> int:
    """Seed the two and return a seed for torch."""
    for_torch, for_numpy, for_python = np.random.SeedSequence(key).generate_state(3).tolist()
    np.random.seed(for_numpy)
    random.seed(for_python)
    return for_torch
