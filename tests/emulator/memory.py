"""Memory of the emulated device, which tells every access that a GPU would let pass or answer at random.

Global memory is the storage of the CPU tensors that a launch was given, shared memory an array a CTA. An access has to
be aligned and to lie in one of them. Two accesses of one place by different threads, one of them a write, have to be
ordered by a barrier (as compute-sanitizer's racecheck demands it): otherwise their order is chance.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

THREAD, WARP, CTA, GRID = range(4)  # who accessed a place, as far as it is remembered


class Fault(Exception):
    """The kernel did what a GPU would not do, or what would end differently from run to run."""


@dataclass(frozen=True)
class Who:
    """The threads that access memory: number in the grid, and how many barriers they have passed."""

    thread: Array
    threads: int  # of a CTA
    cta_barriers: Array
    warp_barriers: Array

    def spread(self, granules: int) -> "Who":
        """The same for accesses of several places each."""
        arrays = (np.repeat(a, granules) for a in (self.thread, self.cta_barriers, self.warp_barriers))
        thread, cta, warp = arrays
        return Who(thread, self.threads, cta, warp)

    def __getitem__(self, chosen: Array) -> "Who":
        return Who(self.thread[chosen], self.threads, self.cta_barriers[chosen], self.warp_barriers[chosen])


class _Accesses:
    """For every place the threads that accessed it and are not known to be done: one of them, and how many share it."""

    def __init__(self, places: int):
        self.thread = np.full(places, -1, np.int64)
        self.level = np.zeros(places, np.int8)
        self.cta_barriers = np.zeros(places, np.int32)
        self.warp_barriers = np.zeros(places, np.int32)

    def before(self, places: Array, who: Who) -> Array:
        """Whether everything remembered of these places happened before what these threads do now."""
        thread, level = self.thread[places], self.level[places]
        same_cta = thread // who.threads == who.thread // who.threads
        same_warp = thread // 32 == who.thread // 32
        return (
            (thread < 0)
            | ((level == THREAD) & (thread == who.thread))
            | ((level <= CTA) & same_cta & (self.cta_barriers[places] < who.cta_barriers))
            | ((level <= WARP) & same_warp & (self.warp_barriers[places] < who.warp_barriers))
        )

    def remember(self, places: Array, who: Who) -> None:
        """Add accesses; those that happened before are forgotten."""
        thread, level = self.thread[places], self.level[places]
        level = np.where(self.before(places, who), THREAD, np.maximum(level, _shared(thread, who)))
        self.thread[places] = who.thread
        self.level[places] = level
        self.cta_barriers[places] = who.cta_barriers
        self.warp_barriers[places] = who.warp_barriers
        last = self.thread[places]  # of several threads that accessed one place at once the last is left
        if (last != who.thread).any():
            np.maximum.at(self.level, places, np.where(last == who.thread, THREAD, _shared(last, who)).astype(np.int8))


def _shared(thread: Array, who: Who) -> Array:
    same_warp, same_cta = thread // 32 == who.thread // 32, thread // who.threads == who.thread // who.threads
    return np.select([thread == who.thread, same_warp, same_cta], [THREAD, WARP, CTA], GRID).astype(np.int8)


class Region:
    """One stretch of memory. Races are looked for in granules of `granule` bytes."""

    def __init__(self, name: str, content: Array, granule: int):
        self.name, self.content, self.granule = name, content, granule
        self._written = _Accesses(-(-len(content) // granule))
        self._read = _Accesses(-(-len(content) // granule))

    def _cells(self, size: int) -> Array:
        return self.content[: len(self.content) // size * size].view(f"V{size}")

    def _places(self, offsets: Array, size: int, who: Who) -> tuple[Array, Who]:
        if size <= self.granule:
            return offsets // self.granule, who
        count = size // self.granule
        return ((offsets // self.granule)[:, None] + np.arange(count)).ravel(), who.spread(count)

    def load(self, offsets: Array, size: int, who: Who, text: str) -> Array:
        """`size` bytes from each offset: uint8 [accesses, size]."""
        places, readers = self._places(offsets, size, who)
        self._refuse_races(self._written, places, readers, f"reads {self.name} that another thread writes", text)
        self._read.remember(places, readers)
        return self._cells(size)[offsets // size].view(np.uint8).reshape(len(offsets), size)

    def store(self, offsets: Array, data: Array, who: Who, text: str) -> None:
        """Write uint8 [accesses, size]; two threads may write one place at once only if they write the same."""
        size = data.shape[1]
        values = np.ascontiguousarray(data).view(f"V{size}")[:, 0]
        cells = self._cells(size)
        places, writers = self._places(offsets, size, who)
        other = cells[offsets // size] != values
        if not other.all():
            changed = np.repeat(other, len(places) // len(offsets))
            places, writers = places[changed], writers[changed]
        self._refuse_races(self._read, places, writers, f"writes {self.name} that another thread reads", text)
        self._refuse_races(self._written, places, writers, f"writes {self.name} that another thread writes", text)
        self._written.remember(places, writers)
        cells[offsets // size] = values
        conflict = cells[offsets // size] != values
        if conflict.any():
            at = int(offsets[conflict][0])
            raise Fault(f"threads store different values to byte {at} of {self.name} at once: {text}")

    def _refuse_races(self, accesses: _Accesses, places: Array, who: Who, does: str, text: str) -> None:
        ordered = accesses.before(places, who)
        if not ordered.all():
            at, thread = int(places[~ordered][0]), int(who.thread[~ordered][0])
            place = f"byte {at * self.granule}"
            raise Fault(f"without a barrier thread {thread} {does} (thread {accesses.thread[at]}, {place}): {text}")


class GlobalMemory:
    """The tensors a kernel was given; tensors that share a storage share a region."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        regions: dict[int, Region] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in regions:
                content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                regions[storage.data_ptr()] = Region(name, content, 2)
        self._starts = np.array(sorted(regions), np.uint64)
        self._regions = [regions[int(start)] for start in self._starts]

    def _parts(self, addresses: Array, size: int, text: str) -> list[tuple[Region, Array, Array]]:
        # (region, which accesses, their offsets in it)
        if (addresses % np.uint64(size)).any():
            raise Fault(f"address not a multiple of {size}: {text}")
        number = np.searchsorted(self._starts, addresses, "right") - 1
        parts = []
        for found in np.unique(number):
            chosen = np.flatnonzero(number == found)
            region = self._regions[max(found, 0)]
            offsets = addresses[chosen].astype(np.int64) - np.int64(self._starts[max(found, 0)])
            outside = (offsets < 0) | (offsets + size > len(region.content))
            if outside.any():
                at = int(offsets[outside][0])
                raise Fault(f"byte {at} of {region.name}, which has {len(region.content)} bytes: {text}")
            parts.append((region, chosen, offsets))
        return parts

    def load(self, addresses: Array, size: int, who: Who, text: str) -> Array:
        """`size` bytes from each address: uint8 [accesses, size]."""
        out = np.empty((len(addresses), size), np.uint8)
        for region, chosen, offsets in self._parts(addresses, size, text):
            out[chosen] = region.load(offsets, size, who[chosen], text)
        return out

    def store(self, addresses: Array, data: Array, who: Who, text: str) -> None:
        """Write uint8 [accesses, size]."""
        for region, chosen, offsets in self._parts(addresses, data.shape[1], text):
            region.store(offsets, data[chosen], who[chosen], text)
