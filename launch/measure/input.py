"""How fast the images of a training come: what one core makes of them in a second, and where its time goes."""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from evmamba.cost import timed
from evmamba.tasks.data import STAGE, TaskDataModule, marked_stages

# What is left beside the marked stages: seeding, looking up, putting a batch together.
REST = "seed and collate"
# PyTorch's own mark around a batch that is made in the training's process.
BATCH = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


@dataclass(frozen=True)
class InputRate:
    """What was measured.

    Attributes:
        per_core: images a second and core, by the time that the operating system gave this process: other work on the
            machine takes none of it.
        shares: stage -> part of that time, from a pass of its own under torch's profiler.
        loader: images a second, by the clock, that the recipe's loader delivered with its own processes.
        workers: those processes.
        on_device: images a second, by the clock, that the device decodes and augments, where it does.
    """

    per_core: float
    shares: dict[str, float]
    loader: float
    workers: int
    on_device: float | None = None

    def milliseconds(self, stage: str) -> float:
        """Of one core, for one image."""
        return 1000 * self.shares[stage] / self.per_core

    def cores_for(self, rate: float) -> float:
        """How many cores feed a device that takes `rate` images a second."""
        return rate / self.per_core


def measure_input(data: TaskDataModule, seconds: float, device: str = "cpu") -> InputRate:
    """Load training batches as a recipe does: in this process on one thread, then through its own loader.

    Args:
        data: a task's data module without a trainer.
        seconds: for each of the passes, at least one batch each; a first batch's costs are left out.
        device: for what the data module does there.

    Raises:
        UserError: what the data module finds wrong.
    """
    data.check_device(torch.device(device))
    data.prepare_data()
    data.setup("fit")
    workers, threads = data.num_workers, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data.num_workers = 0
        batches = _batches(data.train_dataloader())
        next(batches)
        begin = time.process_time()
        images = _count(batches, seconds)
        per_core = images / (time.process_time() - begin)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report starting and stopping
        with marked_stages(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
            _count(batches, seconds)
    finally:
        torch.set_num_threads(threads)
        data.num_workers = workers
    delivered = _loader_rate(data.train_dataloader(), seconds)
    on_device = _device_rate(data, seconds, torch.device(device)) if data.works_on_device else None
    return InputRate(per_core, _shares(profiler), delivered, workers, on_device)


def _batches(loader: DataLoader) -> Iterator[int]:
    """Make batch after batch, epoch after epoch; their numbers of images."""
    for epoch in itertools.count():
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for batch in loader:
            yield len(batch["path"])


def _count(batches: Iterator[int], seconds: float) -> int:
    started, images = time.perf_counter(), 0
    for size in batches:
        images += size
        if time.perf_counter() - started > seconds:
            break
    return images


def _loader_rate(loader: DataLoader, seconds: float) -> float:
    batches = _batches(loader)
    next(batches)  # processes start
    started = time.perf_counter()
    return _count(batches, seconds) / (time.perf_counter() - started)


def _device_rate(data: TaskDataModule, seconds: float, device: torch.device) -> float:
    """Of one batch, again and again; the first time prepares the device."""
    batch = next(iter(data.train_dataloader()))
    spent: list[float] = []

    def finish() -> None:
        moved = data.transfer_batch_to_device(dict(batch), device, 0)
        data.on_after_batch_transfer(moved, 0)

    while len(spent) < 2 or sum(spent[1:]) < seconds:
        spent.append(timed(finish, device))
    return len(batch["path"]) * (len(spent) - 1) / sum(spent[1:])


def _shares(profiler: profile) -> dict[str, float]:
    spent = {event.key: event.cpu_time_total for event in profiler.key_averages()}
    stages = {key.removeprefix(STAGE): time for key, time in spent.items() if key.startswith(STAGE)}
    whole = spent[BATCH]
    return {name: time / whole for name, time in stages.items()} | {REST: 1 - sum(stages.values()) / whole}
