"""Which images a process sees: evaluation without padding, and a training order that depends on (seed, epoch) only.

Both derive from torch's DistributedSampler, so that Lightning does not replace them by one that pads.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from evmamba.errors import UserError


class EvaluationSampler(DistributedSampler[int]):
    """Items r, r + w, r + 2w, ... for rank r of w: every item exactly once over all ranks, in order, no padding.

    Lightning skips the evaluation loop, hooks and collectives included, on a rank without batches, and the other ranks
    then wait for it for ever. So a rank without items of its own gets item 0 and :attr:`ignored` is True: its loader
    must mark the batch with ``ignore=True`` and the steps do nothing with it.

    Args:
        n: number of items, at least 1.
        rank: this process, 0 <= rank < world.
        world: number of processes.
    """

    def __init__(self, n: int, rank: int, world: int) -> None:
        if n < 1:
            raise UserError("there is nothing to evaluate: the validation set is empty")
        super().__init__(range(n), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.items = range(rank, n, world)

    @property
    def ignored(self) -> bool:
        """True where this rank has no item of its own and item 0 only keeps it in step with the others."""
        return len(self.items) == 0

    def __iter__(self) -> Iterator[int]:
        return iter([0] if self.ignored else self.items)

    def __len__(self) -> int:
        return max(1, len(self.items))


class TrainingSampler(DistributedSampler[tuple[int, int]]):
    """Keys (epoch, index): a random order of all items, divided among the ranks, incomplete last rounds dropped.

    The order depends on (seed, epoch) only, so every number of processes walks through the same one.

    Args:
        n: number of items, at least `world`.
        rank: this process, 0 <= rank < world.
        world: number of processes.
        seed: the run's seed.
        epoch: first epoch; Lightning calls :meth:`set_epoch` before each one.

    Attributes:
        start: how many of this rank's items to leave out at the beginning, when an epoch is continued.
    """

    def __init__(self, n: int, rank: int, world: int, seed: int = 0, epoch: int = 0) -> None:
        if n < world:
            raise UserError(f"{n} training images are too few for {world} processes; use at most {max(n, 1)}")
        super().__init__(range(n), num_replicas=world, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.n = n
        self.start = 0
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Seeded with the pair: seed + epoch would give run 0's second epoch to run 1 as its first.
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n).tolist()
        return iter([(self.epoch, index) for index in self.share(order)[self.start :]])

    def share(self, order: list[int]) -> list[int]:
        """This rank's part of an epoch's order."""
        return order[self.rank : len(self) * self.num_replicas : self.num_replicas]

    def __len__(self) -> int:
        """Items of this rank in a whole epoch, wherever it starts."""
        return self.n // self.num_replicas


class OrientedTrainingSampler(TrainingSampler):
    """Batches of one orientation, so that little has to be padded; the rest as `TrainingSampler`.

    The batches of an epoch follow from (seed, epoch, batch size) only and are dealt out to the ranks in turn, so every
    number of processes trains on the same ones. The last that do not go round are dropped.

    Args:
        portrait: for every item whether it is higher than wide.
        batch_size: items of a batch, that is, per rank and step.
        rank, world, seed: see `TrainingSampler`.
    """

    def __init__(self, portrait: Sequence[bool], batch_size: int, rank: int, world: int, seed: int = 0) -> None:
        super().__init__(len(portrait), rank, world, seed)
        self.portrait = portrait
        self.batch_size = batch_size

    def share(self, order: list[int]) -> list[int]:
        if len(self) < self.batch_size:  # too few for a whole batch: there is nothing to choose
            return super().share(order)
        batches = oriented_batches(order, self.portrait, self.batch_size)
        mine = batches[self.rank : len(self) // self.batch_size * self.num_replicas : self.num_replicas]
        return [index for batch in mine for index in batch]

    def __len__(self) -> int:
        each = super().__len__()
        return each - each % self.batch_size if each >= self.batch_size else each


def oriented_batches(order: Sequence[int], portrait: Sequence[bool], size: int) -> list[list[int]]:
    """Cut an order into batches of one orientation, each as soon as it is full; what remains of both comes last.

    This is mmdetection's AspectRatioBatchSampler.

    Args:
        order: of the items.
        portrait: for every item whether it is higher than wide.
        size: of a batch.

    Returns:
        All items in batches, of which the last may be smaller and of both kinds.
    """
    batches = []
    queues: dict[bool, list[int]] = {True: [], False: []}
    for index in order:
        queue = queues[bool(portrait[index])]
        queue.append(index)
        if len(queue) == size:
            batches.append(queue.copy())
            queue.clear()
    left = queues[True] + queues[False]
    return batches + [left[start : start + size] for start in range(0, len(left), size)]


class TrainingLoader(DataLoader):
    """A loader that begins where the training stands.

    Lightning asks for the iterator before it has restored a checkpoint and told the sampler its epoch, and loading
    processes begin at once. So everything waits here until the first batch is asked for.

    Args:
        dataset, sampler, options: as for DataLoader.
        position: tells the number of batches of this epoch that are done already.
    """

    def __init__(self, dataset: Dataset, sampler: TrainingSampler, position: Callable[[], int], **options: Any) -> None:
        super().__init__(dataset, sampler=sampler, **options)
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, TrainingSampler)
        assert self.batch_size is not None
        self.sampler.start = self.position() * self.batch_size
        yield from super().__iter__()
