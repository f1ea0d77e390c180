"""Predicts how long a loop of machine code takes: four schedulers of one multiprocessor, warps that issue in order.

Each cycle a scheduler issues one instruction of the first warp after the last one that may issue: its stall is
over, its scoreboards are down, and the unit it needs has room. Rates and latencies are Hopper's as far as they are
known from microbenchmarks of others (arXiv 2402.13499, arXiv 1804.06826); loads are taken to hit L1 and, where said,
wait longer. Nothing here was calibrated on a GPU: errors of tens of percent are to be expected.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .sass import Code, Instruction

ALU = re.compile(
    "IADD3|ISETP|LOP3|SHF|PRMT|MOV|FSETP|FSEL|PLOP3|LEA|SEL|FMNMX|VIADD|V?IMNMX|F2FP|R2P|P2R|LOP|I2FP|CS2R|IABS|BMSK|POPC"
)
MEMORY = re.compile("LD[GSL]|ST[GSL]|STSM|LDSM|SHFL|CCTL|LDC|LD|ST|ATOM|RED|LDGSTS|LDGDEPBAR")
MULTIPROCESSOR_REGISTERS = 65536
SCHEDULERS = 4


@dataclass
class Rates:
    """Cycles for which an instruction of one warp holds its unit, and cycles until its result is there."""

    busy: dict[str, int] = field(
        default_factory=lambda: {"exp": 8, "fma": 1, "alu": 2, "uniform": 1, "tensor": 8, "memory": 1, "other": 0}
    )
    latency: dict[str, int] = field(
        default_factory=lambda: {"exp": 23, "fma": 4, "alu": 4, "uniform": 12, "tensor": 34, "memory": 33, "other": 6}
    )
    shared_latency: int = 29
    shuffle_latency: int = 23
    far_latency: int = 250  # of 16-bit loads: the map comes from L2
    memory_queue: int = 6  # instructions of a scheduler under way in the memory pipe
    barrier: int = 18


def unit(name: str) -> str:
    """The unit that runs an instruction."""
    base = name.split(".")[0]
    if base == "MUFU":
        return "exp"
    if MEMORY.fullmatch(base):
        return "memory"
    if base in ("HMMA", "IMMA", "QMMA"):
        return "tensor"
    if base in ("FFMA", "FMUL", "FADD", "HFMA2") or base.startswith("IMAD"):
        return "fma"
    if ALU.fullmatch(base):
        return "alu"
    if base.startswith("U") or base in ("S2UR", "R2UR", "S2R"):
        return "uniform"
    return "barrier" if base in ("BAR", "WARPSYNC") else "other"


@dataclass
class _Warp:
    at: int
    ready: int = 0
    scoreboards: list[int] = field(default_factory=lambda: [0] * 6)
    rounds: int = 0
    start: int = 0
    end: int | None = None


def cycles(body: Sequence[Instruction], warps: int, rounds: int = 3, rates: Rates | None = None) -> float:
    """Cycles of one round of the loop for each of `warps` warps that share a scheduler, in the steady state."""
    rates = rates or Rates()
    chance = random.Random(0)
    units = [unit(i.name) for i in body]
    groups = [[_Warp(chance.randrange(len(body))) for _ in range(warps)] for _ in range(SCHEDULERS)]
    free = [dict.fromkeys(rates.busy, 0) for _ in range(SCHEDULERS)]
    under_way: list[list[int]] = [[] for _ in range(SCHEDULERS)]
    last = [0] * SCHEDULERS
    memory_free, now, running = 0, 0, SCHEDULERS * warps
    while running:
        for s, group in enumerate(groups):
            under_way[s] = [end for end in under_way[s] if end > now]
            for shift in range(1, warps + 1):
                number = (last[s] + shift) % warps
                warp = group[number]
                instruction, kind = body[warp.at], units[warp.at]
                if warp.ready > now or any(instruction.waits >> b & 1 and warp.scoreboards[b] > now for b in range(6)):
                    continue
                if kind == "exp" and free[s]["exp"] - now > rates.busy["exp"]:
                    continue  # one more may wait in front of the unit
                if kind in ("fma", "alu", "uniform", "tensor") and free[s][kind] > now:
                    continue
                if kind in ("memory", "barrier") and len(under_way[s]) >= rates.memory_queue:
                    continue
                last[s] = number
                result, operands_read = now + 6, now + 6
                if kind == "memory":
                    busy, latency = _memory(instruction.name, rates)
                    begin = max(now, memory_free)
                    memory_free = begin + busy
                    under_way[s].append(begin + busy)
                    result, operands_read = begin + busy + latency, begin + busy + 4
                elif kind in rates.busy and kind != "other":
                    begin = max(now, free[s][kind])
                    free[s][kind] = begin + rates.busy[kind]
                    result, operands_read = begin + rates.busy[kind] + rates.latency[kind], begin + 8
                if instruction.write_barrier < 6:
                    warp.scoreboards[instruction.write_barrier] = max(
                        warp.scoreboards[instruction.write_barrier], result
                    )
                if instruction.read_barrier < 6:
                    warp.scoreboards[instruction.read_barrier] = max(
                        warp.scoreboards[instruction.read_barrier], operands_read
                    )
                warp.ready = now + max(1, instruction.stall, rates.barrier if kind == "barrier" else 0)
                warp.at += 1
                if warp.at == len(body):
                    warp.at = 0
                    warp.rounds += 1
                    if warp.rounds == 1:
                        warp.start = now
                    if warp.rounds == 1 + rounds and warp.end is None:
                        warp.end = now
                        running -= 1
                break
        now += 1
    spans = [(warp.end or 0) - warp.start for group in groups for warp in group]
    return sum(spans) / len(spans) / rounds


def _memory(name: str, rates: Rates) -> tuple[int, int]:
    width = 4 if ".128" in name else 2 if ".64" in name else 1
    if name.startswith("LDS"):
        return max(1, width // 2), rates.shared_latency
    if name.startswith("SHFL"):
        return 1, rates.shuffle_latency
    if name.startswith("LD"):
        return width, rates.far_latency if "U16" in name else rates.latency["memory"]
    return 1, 12


def outermost(code: Code, trips: Callable[[list[Instruction]], int]) -> list[Instruction]:
    """One round of the longest loop, with the loops inside it written out as often as `trips` says of their bodies."""
    loops = sorted(code.loops(), key=lambda loop: loop[0] - loop[1])
    first, last = loops[0]
    inside = [loop for loop in loops[1:] if first <= loop[0] and loop[1] <= last]
    inside = [a for a in inside if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in inside)]
    body: list[Instruction] = []
    at = first
    for begin, end in sorted(inside):
        body += [i for i in code.between(at, begin) if i.address < begin]
        body += code.between(begin, end) * trips(code.between(begin, end))
        at = end + 1
    return body + code.between(at, last)


def resident_warps(registers: int) -> int:
    """Warps of single-warp programs that the registers let one scheduler hold, 16 at most."""
    granted = -(-registers // 8) * 8 * 32
    return min(MULTIPROCESSOR_REGISTERS // granted // SCHEDULERS, 16)


def microseconds(
    rounds: int,
    programs: int,
    body: Sequence[Instruction],
    registers: int,
    multiprocessors: int = 132,
    clock: float = 1980,
) -> float:
    """A kernel of `programs` warps, each going `rounds` times through `body`, on the busiest multiprocessor."""
    waiting = -(-programs // multiprocessors)
    waiting = -(-waiting // SCHEDULERS)
    most, total = resident_warps(registers), 0.0
    while waiting > 0:
        together = min(waiting, most)
        total += rounds * cycles(body, together) / clock
        waiting -= together
    return total
