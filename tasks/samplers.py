"""Which images a process sees: evaluation without padding, and a training order that depends on (seed, epoch) only.

Both derive from torch's DistributedSampler, so that Lightning does not replace them by one that pads.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler

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


class TrainingSampler(DistributedSampler[int]):
    """A shuffled epoch, divided between ranks; the order depends on (seed, epoch) only, never on the number of ranks.

    Every rank gets the same number of items, so up to world - 1 items of an epoch (others each time) are left out.

    Args:
        n: number of items, at least `world`.
        rank: this process, 0 <= rank < world.
        world: number of processes.
        seed: the run's seed.
        epoch: first epoch; Lightning calls :meth:`set_epoch` before each one.
    """

    def __init__(self, n: int, rank: int, world: int, seed: int = 0, epoch: int = 0) -> None:
        if n < world:
            raise UserError(f"{n} training images are too few for {world} processes; use at most {max(n, 1)}")
        super().__init__(range(n), num_replicas=world, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.n = n
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        # Seeded with the pair: seed + epoch would give run 0's second epoch to run 1 as its first.
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n).tolist()
        return iter(order[self.rank : len(self) * self.num_replicas : self.num_replicas])

    def __len__(self) -> int:
        return self.n // self.num_replicas
