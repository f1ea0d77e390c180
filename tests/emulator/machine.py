"""Executes a kernel's PTX on the CPU: all CTAs of a grid side by side, a warp at a time between barriers.

A register holds one number for every thread of a group of warps, so that NumPy does the arithmetic; groups split where
a branch parts their warps. Warps of a CTA run one after the other until each waits at a barrier, in an order that
`order` chooses. What a copy or a product that runs beside the instructions writes comes into being when it is waited
for, and shared memory is full of NaN before it is written. Approximate instructions (ex2, lg2) err by as much as the
manual allows.

Not checked: fences between the proxies of shared memory, streams, what a GPU's scheduler does to instructions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .memory import Array, Fault, GlobalMemory, Region, Who
from .ptx import Address, Constant, Instruction, Kernel, Name, Operand, Register

UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
SIGNED = {8: np.dtype("i1"), 16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}
LANES_AT_ONCE = 16384
APPROXIMATION = 2.0**-22  # largest error of ex2.approx and lg2.approx
POISON = 0xFF

Mask = Array | None
Action = Callable[["Warps", Mask], None]


def bits(type: str) -> int:
    """Bits of a number of this type; a predicate counts one."""
    if type == "pred":
        return 1
    digits = type.removesuffix("x2").lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) * (2 if type.endswith("x2") else 1)


@dataclass
class Pending:
    """Work that runs beside the instructions: what it does once it is waited for, and its operands, one a thread."""

    finish: Callable[..., None]
    operands: tuple[Array, ...]


@dataclass
class Warps:
    """Warps at one instruction. Arrays have 32 entries a warp."""

    launch: "Launch"
    slot: Array  # of the CTA, among those that run side by side
    thread: Array  # in the CTA
    instruction: int = 0
    registers: dict[str, Array] = field(default_factory=dict)
    copies: list[list[Pending]] = field(default_factory=lambda: [[]])
    products: list[list[Pending]] = field(default_factory=lambda: [[]])
    cta_barriers: int = 0
    warp_barriers: int = 0

    @property
    def lanes(self) -> int:
        return len(self.thread)

    def who(self, mask: Mask) -> Who:
        """The threads that take part, for memory's checks."""
        numbers = self.launch.ctas[self.slot] * self.launch.kernel.threads + self.thread
        who = Who(numbers, self.launch.kernel.threads, *(np.full(self.lanes, n) for n in self.barriers))
        return who if mask is None else who[mask]

    @property
    def barriers(self) -> tuple[int, int]:
        return self.cta_barriers, self.warp_barriers

    def write(self, name: str, value: Array, mask: Mask) -> None:
        """Set a register in the threads that take part; in others an unset one is poison."""
        if name == "_":
            return
        if value.ndim == 0:
            value = np.full(self.lanes, value)
        if mask is not None:
            old = self.registers.get(name)
            if old is None or old.dtype != value.dtype:
                old = np.full(self.lanes, POISON, np.uint8).astype(bool) if value.dtype == bool else _poison(value)
            value = np.where(mask, value, old)
        self.registers[name] = value

    def part(self, lanes: Array) -> "Warps":
        """Only some of the warps."""
        registers = {name: value[lanes] for name, value in self.registers.items()}

        def pending(groups: list[list[Pending]]) -> list[list[Pending]]:
            return [[Pending(p.finish, tuple(o[lanes] for o in p.operands)) for p in group] for group in groups]

        return Warps(
            self.launch, self.slot[lanes], self.thread[lanes], self.instruction, registers,
            pending(self.copies), pending(self.products), self.cta_barriers, self.warp_barriers,
        )  # fmt: skip


def _poison(like: Array) -> Array:
    return np.full(like.shape, -1, f"i{like.dtype.itemsize}").view(like.dtype)


def wait(warps: Warps, groups: list[list[Pending]], left: int) -> None:
    """Finish all but the last `left` groups of pending work."""
    while len(groups) - 1 > left:
        for pending in groups.pop(0):
            pending.finish(warps, *pending.operands)


class Launch:
    """One kernel launch: its grid, parameters and memories."""

    def __init__(
        self, kernel: Kernel, grid: Sequence[int], parameters: Sequence[int], memory: GlobalMemory,
        shared_bytes: int, order: random.Random | None = None,
    ):  # fmt: skip
        self.kernel, self.grid, self.memory, self.order = kernel, tuple(grid), memory, order
        self.parameters = dict(zip(kernel.parameters, parameters, strict=True))
        self.shared_bytes = -(-max(shared_bytes, 16) // 128) * 128
        self.ctas: Array
        self.shared: Region
        self.tensor_memory: Array  # of sm_100: 128 lanes of 512 columns a CTA
        self.barriers: dict[tuple[int, int], list[Any]] = {}  # by slot and address: completed phases

    def run(self) -> None:
        """Execute all CTAs. Raises Fault."""
        total = int(np.prod(self.grid))
        together = max(1, LANES_AT_ONCE // self.kernel.threads)
        order = list(range(0, total, together))
        if self.order:
            self.order.shuffle(order)
        program = _program(self.kernel)
        with np.errstate(all="ignore"):
            for first in order:
                self._run_together(np.arange(first, min(first + together, total)), program)

    def _run_together(self, ctas: Array, program: list[tuple[Action, Instruction]]) -> None:
        self.ctas = ctas
        self.shared = Region("shared memory", np.full(len(ctas) * self.shared_bytes, POISON, np.uint8), 1)
        self.tensor_memory = np.full((len(ctas), 128, 512), 0xFFFFFFFF, np.uint32)
        self.barriers.clear()
        slots = np.repeat(np.arange(len(ctas)), 32)
        ready = [
            Warps(self, slots, np.tile(np.arange(first, first + 32, dtype=np.uint32), len(ctas)))
            for first in range(0, self.kernel.threads, 32)
        ]
        while ready:
            if self.order:
                self.order.shuffle(ready)
            waiting: list[Warps] = []
            blocked: list[Warps] = []  # by a barrier in memory, until another warp arrives there
            progress = False
            ended: list[Warps] = []
            while ready or blocked:
                if not ready:
                    if not progress:
                        raise Fault("all warps wait for each other")
                    ready, blocked, progress = blocked, [], False
                warps = ready.pop(0)
                before = warps.instruction
                state = self._advance(warps, program, ready)
                progress = progress or state != "blocked" or warps.instruction != before
                {"barrier": waiting, "blocked": blocked, "end": ended}[state].append(warps)
            self._check_all_wait(waiting, ended)
            for warps in waiting:
                warps.cta_barriers += 1
                warps.warp_barriers += 1
            ready = waiting

    @staticmethod
    def _check_all_wait(waiting: list[Warps], ended: list[Warps]) -> None:
        slots = {slot for warps in waiting for slot in warps.slot.tolist()}
        if any(slots & set(warps.slot.tolist()) for warps in ended):
            raise Fault("some warps of a CTA wait at a barrier, others have ended")

    def _advance(self, warps: Warps, program: list[tuple[Action, Instruction]], ready: list[Warps]) -> str:
        # Run until a barrier or the end; parts that another branch takes are put in front of `ready`.
        while True:
            if warps.instruction >= len(program):
                raise Fault("ran past the last instruction")
            action, instruction = program[warps.instruction]
            warps.instruction += 1
            mask: Mask = None
            if instruction.predicate is not None:
                mask = warps.registers[instruction.predicate]
                mask = mask if instruction.wanted else ~mask
            if instruction.name == "bra":
                self._branch(warps, instruction, mask, ready)
                continue
            if instruction.name == "ret":
                if mask is not None and not mask.all():
                    raise Fault(f"some threads end, others go on: {instruction.text}")
                return "end"
            if mask is not None:
                if mask.all():
                    mask = None
                elif not mask.any():
                    continue
            if instruction.opcode.startswith("bar.sync"):
                return "barrier"
            try:
                action(warps, mask)
            except Blocked:
                warps.instruction -= 1
                return "blocked"

    def _branch(self, warps: Warps, instruction: Instruction, mask: Mask, ready: list[Warps]) -> None:
        target = instruction.operands[0]
        assert isinstance(target, Name)
        where = self.kernel.labels[target.text]
        if mask is None or mask.all():
            warps.instruction = where
        elif mask.any():
            by_warp = mask.reshape(-1, 32)
            if (by_warp.any(1) != by_warp.all(1)).any():
                raise Fault(f"threads of a warp part: {instruction.text}")
            taken = warps.part(np.flatnonzero(mask))
            taken.instruction = where
            ready.insert(0, taken)
            stay = warps.part(np.flatnonzero(~mask))
            warps.__dict__.update(stay.__dict__)


class Blocked(Exception):
    """A warp waits for another one's arrival at a barrier in memory."""


_PROGRAMS: dict[int, tuple[Kernel, list[tuple[Action, Instruction]]]] = {}
DECODERS: dict[str, Callable[[Instruction], Action]] = {}


def _program(kernel: Kernel) -> list[tuple[Action, Instruction]]:
    if id(kernel) not in _PROGRAMS:
        _PROGRAMS[id(kernel)] = kernel, [(_decode(i), i) for i in kernel.instructions]
    return _PROGRAMS[id(kernel)][1]


def _decode(instruction: Instruction) -> Action:
    if instruction.name in ("bra", "ret") or instruction.opcode.startswith("bar.sync"):
        return lambda warps, mask: None  # the scheduler's
    decoder = DECODERS.get(instruction.name)
    if decoder is None:
        raise NotImplementedError(f"the emulator does not know {instruction.text}")
    return decoder(instruction)


def decodes(*names: str) -> Callable[[Callable[[Instruction], Action]], Callable[[Instruction], Action]]:
    """Register what turns instructions of these names into an action."""

    def register(decoder: Callable[[Instruction], Action]) -> Callable[[Instruction], Action]:
        DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return register


# --- operands


def reader(operand: Operand, type: str) -> Callable[[Warps], Array]:
    """A function that reads an operand as bits of this type's width (predicates as bool)."""
    dtype = UNSIGNED[bits(type)]
    if isinstance(operand, Constant):
        number = operand.bits & ((1 << bits(type)) - 1) if type != "pred" else operand.bits != 0
        constant = np.array(number, dtype)
        return lambda warps: constant
    if isinstance(operand, Register) and operand.name.split(".")[0] in _SPECIAL:
        read_special = _SPECIAL[operand.name.split(".")[0]]
        axis = "xyz".find(operand.name[-1])
        return lambda warps: read_special(warps, axis)
    if isinstance(operand, Name) and "@" not in operand.text:
        zero = np.zeros((), dtype)  # shared memory starts at 0
        return lambda warps: zero
    name = register(operand)

    def read(warps: Warps) -> Array:
        try:
            value = warps.registers[name]
        except KeyError:
            raise Fault(f"{name} is read before it is written") from None
        return value if value.dtype == dtype else value.astype(dtype)

    return read


_SPECIAL: dict[str, Callable[[Warps, int], Array]] = {
    "%tid": lambda warps, axis: warps.thread if axis == 0 else np.zeros((), np.uint32),
    "%ctaid": lambda warps, axis: _cta(warps, axis),
    "%nctaid": lambda warps, axis: np.array(warps.launch.grid[axis], np.uint32),
    "%laneid": lambda warps, axis: warps.thread % np.uint32(32),
}


def _cta(warps: Warps, axis: int) -> Array:
    x, y, _ = warps.launch.grid
    number = warps.launch.ctas[warps.slot]
    return (number % x, number // x % y, number // (x * y))[axis].astype(np.uint32)


def register(operand: Operand) -> str:
    """The name under which an operand is kept."""
    if isinstance(operand, Register):
        return operand.name
    assert isinstance(operand, Name), operand
    return operand.text


def registers(operand: Operand) -> list[str]:
    """The names of a braced list, or of one register."""
    return [register(o) for o in (operand if isinstance(operand, tuple) else (operand,))]


def floats(operand: Operand) -> Callable[[Warps], Array]:
    """A function that reads float32."""
    read = reader(operand, "b32")
    return lambda warps: read(warps).view(np.float32)


def signed_or_not(operand: Operand, type: str) -> Callable[[Warps], Array]:
    """A function that reads integers, signed where the type is."""
    read = reader(operand, type)
    if type[0] != "s":
        return read
    dtype = SIGNED[bits(type)]
    return lambda warps: read(warps).view(dtype)


def numbers(operand: Operand, type: str) -> Callable[[Warps], Array]:
    """A function that reads float32 or integers, as the type says."""
    if type[0] == "f" and bits(type) != 32:
        raise NotImplementedError(f"arithmetic in {type}")
    return floats(operand) if type == "f32" else signed_or_not(operand, type)


def unsigned(value: Array) -> Array:
    """The bits of a number."""
    return value if value.dtype == bool else value.view(UNSIGNED[value.dtype.itemsize * 8])


def addresses(operand: Operand) -> Callable[[Warps], Array]:
    """A function that reads [base + offset], 64 bits."""
    assert isinstance(operand, Address), operand
    read, offset = reader(operand.base, "b64"), np.uint64(operand.offset & (2**64 - 1))
    return lambda warps: np.broadcast_to(read(warps) + offset, warps.lanes)


def shared_offsets(warps: Warps, address: Array, size: int, mask: Mask, text: str) -> Array:
    """Places in the array of all CTAs' shared memories, for the threads that take part."""
    slot = warps.slot
    if mask is not None:
        address, slot = address[mask], slot[mask]
    if (address + np.uint64(size) > warps.launch.shared_bytes).any() or (address % np.uint64(size)).any():
        raise Fault(f"address {int(address.max())} in {warps.launch.shared_bytes} bytes of shared memory: {text}")
    return address.astype(np.int64) + slot * warps.launch.shared_bytes


# --- moves, loads and stores


def _reader_of_part(operand: Operand, width: int) -> Callable[[Warps], Array]:
    # The compiler packs registers that nobody has written into halves that nobody reads: all ones, which is NaN, shows
    # in a result if somebody does.
    read = reader(operand, f"b{width}")
    plain = isinstance(operand, Register) and operand.name.split(".")[0] not in _SPECIAL
    name = register(operand) if plain else None
    garbage = ~np.zeros((), UNSIGNED[width])

    def read_part(warps: Warps) -> Array:
        return read(warps) if name is None or name in warps.registers else garbage

    return read_part


@decodes("mov")
def _mov(i: Instruction) -> Action:
    target, source = i.operands
    width = bits(i.type)
    if isinstance(target, tuple):
        part = width // len(target)
        read, names = reader(source, i.type), registers(target)

        def unpack(warps: Warps, mask: Mask) -> None:
            value = read(warps)
            for k, name in enumerate(names):
                warps.write(name, (value >> UNSIGNED[width].type(k * part)).astype(UNSIGNED[part]), mask)

        return unpack
    if isinstance(source, tuple):
        part = width // len(source)
        reads = [_reader_of_part(s, part) for s in source]

        def pack(warps: Warps, mask: Mask) -> None:
            value = sum(r(warps).astype(UNSIGNED[width]) << UNSIGNED[width].type(k * part) for k, r in enumerate(reads))
            warps.write(register(target), np.asarray(value), mask)

        return pack
    read, name = reader(source, i.type), register(target)
    return lambda warps, mask: warps.write(name, read(warps), mask)


@decodes("cvta")
def _cvta(i: Instruction) -> Action:
    read, name = reader(i.operands[1], "b64"), register(i.operands[0])
    return lambda warps, mask: warps.write(name, read(warps), mask)


@decodes("ld")
def _ld(i: Instruction) -> Action:
    space, size = i.modifiers[0], bits(i.type) // 8
    names, source = registers(i.operands[0]), i.operands[1]
    dtype = UNSIGNED[8 * size]
    if space == "param":
        assert isinstance(source, Address)
        parameter = register(source.base)
        limit = (1 << 8 * size) - 1
        return lambda warps, mask: warps.write(
            names[0], np.array(warps.launch.parameters[parameter] & limit, dtype), mask
        )
    read, total = addresses(source), size * len(names)

    def load(warps: Warps, mask: Mask) -> None:
        address, who = read(warps), warps.who(mask)
        if space == "global":
            data = warps.launch.memory.load(address if mask is None else address[mask], total, who, i.text)
        else:
            offsets = shared_offsets(warps, address, total, mask, i.text)
            data = warps.launch.shared.load(offsets, total, who, i.text)
        words = data.view(dtype)
        for k, name in enumerate(names):
            value = words[:, k]
            if mask is not None:
                value = np.empty(warps.lanes, dtype)
                value[mask] = words[:, k]
            warps.write(name, value, mask)

    return load


@decodes("st")
def _st(i: Instruction) -> Action:
    space, type = i.modifiers[0].split("::")[0], i.type
    read = addresses(i.operands[0])
    sources = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
    reads = [reader(s, type) for s in sources]

    def store(warps: Warps, mask: Mask) -> None:
        address, who = read(warps), warps.who(mask)
        data = np.stack([np.broadcast_to(r(warps), warps.lanes) for r in reads], 1).view(np.uint8)
        if mask is not None:
            data = data[mask]
        if space == "global":
            warps.launch.memory.store(address if mask is None else address[mask], data, who, i.text)
        else:
            offsets = shared_offsets(warps, address, data.shape[1], mask, i.text)
            warps.launch.shared.store(offsets, data, who, i.text)

    return store


@decodes("cp")
def _cp_async(i: Instruction) -> Action:
    if i.modifiers[1] == "commit_group":
        return lambda warps, mask: warps.copies.append([])
    if i.modifiers[1] == "wait_group":
        left = i.operands[0]
        assert isinstance(left, Constant)
        return lambda warps, mask: wait(warps, warps.copies, left.bits)
    size = i.operands[2]
    assert isinstance(size, Constant)
    to, source = addresses(i.operands[0]), addresses(i.operands[1])
    length = reader(i.operands[3] if len(i.operands) > 3 else size, "b32")  # bytes that are copied; zeros fill the rest

    def finish(warps: Warps, offsets: Array, data: Array, active: Array) -> None:
        warps.launch.shared.store(offsets[active], data[active], warps.who(active), i.text)

    def start(warps: Warps, mask: Mask) -> None:
        active = np.ones(warps.lanes, bool) if mask is None else mask
        copied = np.broadcast_to(length(warps), warps.lanes)
        if ((copied != 0) & (copied != size.bits)).any():
            raise NotImplementedError(f"copies of a part: {i.text}")
        offsets = np.zeros(warps.lanes, np.int64)
        offsets[active] = shared_offsets(warps, to(warps), size.bits, active, i.text)
        data = np.zeros((warps.lanes, size.bits), np.uint8)
        reading = active & (copied > 0)
        if reading.any():
            data[reading] = warps.launch.memory.load(source(warps)[reading], size.bits, warps.who(reading), i.text)
        # Until it is waited for nobody may rely on what is there.
        poison = np.full((int(active.sum()), size.bits), POISON, np.uint8)
        warps.launch.shared.store(offsets[active], poison, warps.who(active), i.text)
        warps.copies[-1].append(Pending(finish, (offsets, data, active)))

    return start


@decodes("bar")
def _bar(i: Instruction) -> Action:
    if i.modifiers[0] != "warp":
        raise NotImplementedError(i.text)

    def warp_barrier(warps: Warps, mask: Mask) -> None:
        warps.warp_barriers += 1

    return warp_barrier


@decodes("fence")
def _fence(i: Instruction) -> Action:
    return lambda warps, mask: None


# --- arithmetic


def _writes(i: Instruction, compute: Callable[..., Array], *reads: Callable[[Warps], Array]) -> Action:
    name = register(i.operands[0])
    return lambda warps, mask: warps.write(name, unsigned(compute(*(read(warps) for read in reads))), mask)


_BINARY: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _pairs(compute: Callable[..., Array]) -> Callable[..., Array]:
    # Two float32 in 64 bits, as sm_100 computes with.
    def both(*values: Array) -> Array:
        return compute(*(np.ascontiguousarray(v).reshape(-1, 1).view(np.float32) for v in values)).view(np.uint64)[:, 0]

    return both


@decodes("add", "sub", "min", "max", "and", "or", "xor")
def _binary(i: Instruction) -> Action:
    compute = _BINARY[i.name]
    if i.type == "f32x2":
        return _writes(i, _pairs(compute), *(reader(o, "b64") for o in i.operands[1:]))
    if i.modifiers[-2:] == ("f32", "bf16"):  # the first operand is widened
        narrow = reader(i.operands[1], "b16")
        return _writes(i, compute, lambda warps: _wide_bf16(narrow(warps)), floats(i.operands[2]))
    if "sat" in i.modifiers or i.type in ("f16", "bf16"):
        raise NotImplementedError(i.text)
    return _writes(i, compute, *(numbers(o, i.type) for o in i.operands[1:]))


@decodes("not", "neg", "abs")
def _unary(i: Instruction) -> Action:
    compute = {"not": np.invert, "neg": np.negative, "abs": np.abs}[i.name]
    return _writes(i, compute, numbers(i.operands[1], i.type))


def _product(i: Instruction) -> Callable[[Array, Array], Array]:
    width, sign = bits(i.type), i.type[0] == "s"
    if "wide" in i.modifiers:
        wide = (SIGNED if sign else UNSIGNED)[2 * width]
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if "hi" in i.modifiers:
        if width not in (16, 32):
            raise NotImplementedError(i.text)
        wide, narrow = ((SIGNED if sign else UNSIGNED)[w] for w in (2 * width, width))
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(width)).astype(narrow)
    return lambda a, b: a * b


@decodes("mul")
def _mul(i: Instruction) -> Action:
    if i.type == "f32x2":
        return _writes(i, _pairs(np.multiply), *(reader(o, "b64") for o in i.operands[1:]))
    return _writes(i, _product(i), *(numbers(o, i.type) for o in i.operands[1:]))


@decodes("mad")
def _mad(i: Instruction) -> Action:
    product = _product(i)
    width = bits(i.type) * (2 if "wide" in i.modifiers else 1)
    third = reader(i.operands[3], f"b{width}")
    return _writes(
        i, lambda a, b, c: unsigned(product(a, b)) + c, *(numbers(o, i.type) for o in i.operands[1:3]), third
    )


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


@decodes("fma")
def _fma(i: Instruction) -> Action:
    if i.type == "f32x2":
        return _writes(i, _pairs(_fused), *(reader(o, "b64") for o in i.operands[1:]))
    if i.type != "f32":
        raise NotImplementedError(i.text)
    return _writes(i, _fused, *(floats(o) for o in i.operands[1:]))


@decodes("div", "rem")
def _div(i: Instruction) -> Action:
    def divide(a: Array, b: Array) -> Array:
        if not b.all():
            raise Fault(f"division by zero: {i.text}")
        # Towards zero, as C does it; NumPy rounds down.
        quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)) * np.sign(a) * np.sign(b)
        return (quotient if i.name == "div" else a - quotient * b).astype(a.dtype)

    compute: Callable[..., Array] = np.divide if i.type == "f32" else divide
    return _writes(i, compute, *(numbers(o, i.type) for o in i.operands[1:]))


def _sign(value: Array) -> Array:
    # Plus or minus one, by a number's bits alone, so that runs repeat.
    mixed = value.view(np.uint32) * np.uint32(2654435761)
    return (mixed >> np.uint32(30) & np.uint32(2)).astype(np.float64) - 1.0


def _ex2(value: Array) -> Array:
    return (np.exp2(value.astype(np.float64)) * (1 + APPROXIMATION * _sign(value))).astype(np.float32)


def _lg2(value: Array) -> Array:
    exact = np.log2(value.astype(np.float64))
    near_one = (value > 0.5) & (value < 2)
    return (exact + APPROXIMATION * _sign(value) * np.where(near_one, 1.0, np.abs(exact))).astype(np.float32)


@decodes("rcp", "sqrt", "rsqrt", "ex2", "lg2")
def _function(i: Instruction) -> Action:
    if i.type != "f32":
        raise NotImplementedError(i.text)
    one = np.float32(1)
    functions: dict[str, Callable[[Array], Array]] = {
        "rcp": lambda v: one / v, "sqrt": np.sqrt, "rsqrt": lambda v: one / np.sqrt(v), "ex2": _ex2, "lg2": _lg2,
    }  # fmt: skip
    return _writes(i, functions[i.name], floats(i.operands[1]))


@decodes("shl", "shr")
def _shift(i: Instruction) -> Action:
    width = bits(i.type)
    amount = reader(i.operands[2], "b32")

    def shift(value: Array, by: Array) -> Array:
        # All bits are shifted out where the amount is the width or more.
        inside = by < width
        by = np.where(inside, by, width - 1).astype(value.dtype)
        shifted = value << by if i.name == "shl" else value >> by
        beyond = value >> value.dtype.type(width - 1) if i.name == "shr" and i.type[0] == "s" else value * 0
        return np.where(inside, shifted, beyond)

    return _writes(i, shift, signed_or_not(i.operands[1], i.type), amount)


@decodes("bfe")
def _bfe(i: Instruction) -> Action:
    position, length = i.operands[2:]
    assert isinstance(position, Constant)
    assert isinstance(length, Constant)
    width = bits(i.type)
    end = position.bits + length.bits
    if not length.bits > 0 or end > width:
        raise NotImplementedError(i.text)
    up, down = width - end, width - length.bits
    return _writes(
        i, lambda v: (unsigned(v) << v.dtype.type(up).view(UNSIGNED[width])).view(v.dtype) >> v.dtype.type(down),
        signed_or_not(i.operands[1], i.type),
    )  # fmt: skip


@decodes("selp")
def _selp(i: Instruction) -> Action:
    yes, no, predicate = (*(reader(o, i.type) for o in i.operands[1:3]), reader(i.operands[3], "pred"))
    return _writes(i, np.where, predicate, yes, no)


@decodes("setp")
def _setp(i: Instruction) -> Action:
    comparison = i.modifiers[0]
    compare: Callable[[Array, Array], Array]
    if comparison in ("num", "nan"):
        compare = lambda a, b: ~(np.isnan(a) | np.isnan(b)) if comparison == "num" else np.isnan(a) | np.isnan(b)  # noqa: E731
    else:
        unordered = i.type == "f32" and comparison.endswith("u")  # true also where an operand is NaN
        aliases = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
        plain = aliases.get(comparison, comparison.removesuffix("u"))
        ordered = {
            "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal,
        }[plain]  # fmt: skip

        def compare(a: Array, b: Array) -> Array:
            if i.type != "f32":
                return ordered(a, b)
            nan = np.isnan(a) | np.isnan(b)
            return np.where(nan, unordered, ordered(a, b))

    if len(i.modifiers) != 2 or len(i.operands) != 3:
        raise NotImplementedError(i.text)
    return _writes(i, compare, *(numbers(o, i.type) for o in i.operands[1:]))


# --- conversions


def _wide_bf16(value: Array) -> Array:
    return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(value: Array, type: str) -> Array:
    dtype = torch.bfloat16 if type.startswith("bf16") else torch.float16
    narrow = torch.from_numpy(np.ascontiguousarray(value)).to(dtype)
    return narrow.view(torch.int16).numpy().view(np.uint16)


@decodes("cvt")
def _cvt(i: Instruction) -> Action:
    to, source = i.modifiers[-2:]
    if to in ("bf16x2", "f16x2"):
        high, low = floats(i.operands[1]), floats(i.operands[2])

        def pack(a: Array, b: Array) -> Array:
            return _rounded(a, to).astype(np.uint32) << np.uint32(16) | _rounded(b, to)

        return _writes(i, pack, high, low)
    if to in ("bf16", "f16") and source == "f32":
        return _writes(i, lambda v: _rounded(v, to), floats(i.operands[1]))
    if to == "f32" and source == "bf16":
        return _writes(i, _wide_bf16, reader(i.operands[1], "b16"))
    if to == "f32" and source == "f16":
        return _writes(i, lambda v: v.view(np.float16).astype(np.float32), reader(i.operands[1], "b16"))
    if to == "tf32" and source == "f32":  # to the nearest, ties away from zero
        return _writes(i, lambda v: v + np.uint32(0x1000) & np.uint32(0xFFFFE000), reader(i.operands[1], "b32"))
    if to == "f32" and source[0] in "su":
        return _writes(i, lambda v: v.astype(np.float32), signed_or_not(i.operands[1], source))
    if to[0] in "su" and source[0] in "su" and "sat" not in i.modifiers:
        dtype = (SIGNED if to[0] == "s" else UNSIGNED)[bits(to)]
        return _writes(i, lambda v: v.astype(dtype), signed_or_not(i.operands[1], source))
    raise NotImplementedError(i.text)


# --- between the lanes of a warp


@decodes("shfl")
def _shfl(i: Instruction) -> Action:
    read, by = reader(i.operands[1], "b32"), reader(i.operands[2], "b32")
    name, mode = register(i.operands[0]), i.modifiers[1]
    if len(i.operands) != 5 or i.operands[3] != Constant(31):
        raise NotImplementedError(i.text)
    lane = np.arange(32)

    def shuffle(warps: Warps, mask: Mask) -> None:
        if mask is not None:
            raise Fault(f"not all threads of a warp take part: {i.text}")
        value = np.broadcast_to(read(warps), warps.lanes).reshape(-1, 32)
        amount = np.broadcast_to(by(warps), warps.lanes).reshape(-1, 32).astype(np.int64)
        source = {"idx": amount & 31, "bfly": lane ^ amount, "down": lane + amount, "up": lane - amount}[mode]
        source = np.where((source < 0) | (source > 31), lane, source)
        warps.write(name, np.take_along_axis(value, source, 1).reshape(-1), None)

    return shuffle


@decodes("elect")
def _elect(i: Instruction) -> Action:
    leader, predicate = (register(o) for o in i.operands[:2])

    def elect(warps: Warps, mask: Mask) -> None:
        warps.write(leader, np.zeros((), np.uint32), mask)
        warps.write(predicate, warps.thread % 32 == 0, mask)

    return elect
