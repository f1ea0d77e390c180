"""Every item once in evaluation, and one training order whatever the number of processes."""

import pytest

from evmamba.errors import UserError
from evmamba.tasks.samplers import EvaluationSampler, TrainingSampler


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


def test_training_ranks_divide_one_order_equally():
    whole = list(TrainingSampler(11, 0, 1, seed=3))
    parts = [list(TrainingSampler(11, rank, 3, seed=3)) for rank in range(3)]
    assert sorted(whole) == list(range(11))
    assert [len(part) for part in parts] == [3, 3, 3]
    assert [item for step in zip(*parts, strict=True) for item in step] == whole[:9]


def test_training_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        return list(TrainingSampler(50, 0, 1, seed, epoch))

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9  # also not seed + epoch
    sampler = TrainingSampler(50, 0, 1, seed=1)
    sampler.set_epoch(2)
    assert list(sampler) == order(1, 2)


def test_more_processes_than_images_are_refused():
    with pytest.raises(UserError, match="2 training images are too few for 3 processes"):
        TrainingSampler(2, 0, 3)
