"""Every item once in evaluation, and one training order whatever the number of processes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from evmamba.errors import UserError
from evmamba.tasks.training.samplers import (
    EvaluationSampler,
    OrientedTrainingSampler,
    TrainingLoader,
    TrainingSampler,
    oriented_batches,
)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_evaluation_counts_every_item_once_and_no_rank_is_without_items(n: int, world: int):
    samplers = [EvaluationSampler(n, rank, world) for rank in range(world)]
    counted = [item for sampler in samplers if not sampler.ignored for item in sampler]
    assert sorted(counted) == list(range(n))
    assert all(len(list(sampler)) == len(sampler) >= 1 for sampler in samplers)
    assert [sampler.ignored for sampler in samplers] == [rank >= n for rank in range(world)]


def test_evaluation_order_is_rank_strided():
    assert list(EvaluationSampler(8, rank=1, world=3)) == [1, 4, 7]


def test_evaluation_of_nothing_is_refused():
    with pytest.raises(UserError, match="empty"):
        EvaluationSampler(0, 0, 1)


def items(sampler: TrainingSampler) -> list[int]:
    return [index for _, index in sampler]


def test_training_ranks_divide_one_order_equally():
    whole = items(TrainingSampler(11, 0, 1, seed=3))
    parts = [items(TrainingSampler(11, rank, 3, seed=3)) for rank in range(3)]
    assert sorted(whole) == list(range(11))
    assert [len(part) for part in parts] == [3, 3, 3]
    assert [item for step in zip(*parts, strict=True) for item in step] == whole[:9]


def test_training_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        return items(TrainingSampler(50, 0, 1, seed, epoch))

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9  # also not seed + epoch
    sampler = TrainingSampler(50, 0, 1, seed=1)
    sampler.set_epoch(2)
    assert items(sampler) == order(1, 2)
    assert {epoch for epoch, _ in sampler} == {2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_begins_where_the_training_stands_when_its_first_batch_is_asked_for(workers: int):
    sampler = TrainingSampler(20, rank=1, world=2, seed=1)
    done = 0
    options = {"batch_size": 2, "num_workers": workers, "persistent_workers": workers > 0}
    loader = TrainingLoader(Keys(), sampler, lambda: done, **options)  # type: ignore[arg-type]
    whole = [batch.tolist() for batch in loader]
    assert len(whole) == len(loader) == 5

    iterator = iter(loader)
    done = 3  # a checkpoint is restored after Lightning has asked for the iterator
    sampler.set_epoch(1)
    rest = [batch.tolist() for batch in iterator]
    done = 0
    assert rest == [batch.tolist() for batch in loader][3:]
    assert rest != whole[3:]
    assert len(loader) == 5


class Keys(Dataset):
    """Every item is its own key."""

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(key)


def test_more_processes_than_images_are_refused():
    with pytest.raises(UserError, match="2 training images are too few for 3 processes"):
        TrainingSampler(2, 0, 3)


def test_batches_of_one_orientation_are_those_of_mmdetection(golden_sizes: Callable[[str], dict[str, Any]]) -> None:
    cases = golden_sizes("sizes_detection")["batches in order of the sampler"]
    assert cases
    for case in cases:
        portrait = [width < height for width, height in case["width_height"]]
        assert oriented_batches(range(len(portrait)), portrait, case["batch_size"]) == case["batches"]


def batches(n: int, world: int, size: int, epoch: int = 0, start: int = 0) -> list[list[list[int]]]:
    """Of every rank, with every third image a portrait."""
    portrait = [index % 3 == 0 for index in range(n)]
    found = []
    for rank in range(world):
        sampler = OrientedTrainingSampler(portrait, size, rank, world, seed=5)
        sampler.set_epoch(epoch)
        sampler.start = start
        own = items(sampler)
        assert len(own) == len(sampler) - start
        found.append([own[k : k + size] for k in range(0, len(own), size)])
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("n", "size"), [(61, 4), (61, 2), (60, 4), (7, 4)])
def test_any_number_of_processes_trains_on_the_same_oriented_batches(n: int, size: int, world: int) -> None:
    (alone,) = batches(n, 1, size)
    ranks = batches(n, world, size)
    if n // world < size:  # all there is, in a smaller batch, as without grouping
        assert [len(own) for own in ranks] == [1] * world
        assert all(len(own[0]) == n // world for own in ranks)
        return
    steps = len(ranks[0])
    assert steps == n // world // size  # as many as without grouping
    dealt = [own[step] for step in range(steps) for own in ranks]
    assert dealt == alone[: steps * world]
    mixed = [batch for batch in dealt if len({index % 3 == 0 for index in batch}) > 1]
    assert len(mixed) <= 1
    assert len({index for batch in dealt for index in batch}) == steps * world * size
    assert batches(n, world, size, epoch=1) != ranks


def test_oriented_batches_continue_where_the_epoch_stood() -> None:
    whole = batches(61, 2, 4)
    assert batches(61, 2, 4, start=8) == [own[2:] for own in whole]
