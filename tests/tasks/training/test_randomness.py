"""Randomness by key: the same whatever was drawn before, different for every sample, epoch, step and rank."""

import random
from collections.abc import Sequence

import numpy as np
import torch

from evmamba.tasks.training.randomness import TOGETHER, InTwoParts, SeededSamples, seed_step


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


class Begun(InTwoParts):
    """Those that are drawn first and finished together; how many at a time is noted."""

    def __init__(self) -> None:
        self.together: list[int] = []

    def begin(self, index: int) -> tuple[int, tuple[float, float, float, float]]:
        return index, draw()

    def finish(self, begun: Sequence[tuple[int, tuple[float, float, float, float]]]) -> list[tuple]:
        self.together.append(len(begun))
        return [drawn for _, drawn in begun]


def test_samples_of_a_batch_are_those_drawn_alone():
    keys = [(epoch, index) for epoch in range(2) for index in range(TOGETHER)] + [(2, 3)]
    alone = SeededSamples(Draws(range(TOGETHER)), seed=1)
    expected = [alone[key] for key in keys]
    in_two_parts = Begun()
    assert SeededSamples(in_two_parts, seed=1).__getitems__(keys) == expected
    assert in_two_parts.together == [TOGETHER, TOGETHER, 1]
    assert alone.__getitems__(keys) == expected
    assert SeededSamples(in_two_parts, seed=1)[keys[3]] == expected[3]


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
