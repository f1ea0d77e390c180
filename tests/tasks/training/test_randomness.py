"""Randomness by key: the same whatever was drawn before, different for every sample, epoch, step and rank."""

import random

import numpy as np
import torch

from evmamba.tasks.training.randomness import SeededSamples, seed_step


class Draws(list):
    """Every sample is what the three generators give."""

    def __getitem__(self, index):  # type: ignore[override]
        return draw()


def draw() -> tuple[float, float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)


def test_a_sample_depends_on_seed_epoch_and_index_only():
    samples = SeededSamples(Draws(range(4)), seed=1)
    first = {key: samples[key] for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    draw()
    assert {key: samples[key] for key in reversed(first)} == first
    values = [value for drawn in first.values() for value in drawn]
    assert len(set(values)) == len(values)
    assert SeededSamples(Draws(range(4)), seed=2)[0, 0] != first[0, 0]


def test_a_step_depends_on_seed_epoch_batch_and_rank_only():
    def step(*key: int) -> tuple[float, float, float, float]:
        seed_step(*key)
        return draw()

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    first = [step(*key) for key in keys]
    assert [step(*key) for key in reversed(keys)] == first[::-1]
    values = [value for drawn in first for value in drawn]
    assert len(set(values)) == len(values)


def test_a_step_and_a_sample_of_the_same_numbers_differ():
    seed_step(0, 1, 2, 0)
    assert draw() != SeededSamples(Draws(range(4)), seed=0)[1, 2]
