"""Matrix instructions: mma and ldmatrix of a warp, and sm_90's wgmma that four warps run beside their instructions.

Where an element lies in registers and in shared memory is written in the PTX ISA manual's figures for each shape.
"""

import re
from collections.abc import Callable

import numpy as np

from .machine import (
    Action,
    Mask,
    Pending,
    Warps,
    addresses,
    decodes,
    reader,
    registers,
    shared_offsets,
    wait,
)  # fmt: skip
from .memory import Array, Fault
from .ptx import Constant, Instruction

LANE = np.arange(32)
SPANS = {0: 16, 3: 32, 2: 64, 1: 128}  # bytes that a swizzle works on, by wgmma's number of it
ROW, COLUMN = LANE // 4, LANE % 4  # of an 8 x 8 matrix whose lanes hold two elements of a row each


def widen(words: Array, type: str) -> Array:
    """float64 from the bits that a product reads: two halves of a word, or a float32 whose last 13 bits are ignored."""
    if type == "tf32":
        return (words.astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type == "bf16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if type == "f16":
        return words.astype(np.uint16).view(np.float16).astype(np.float64)
    raise NotImplementedError(f"products of {type}")


def _fragment(words: list[Array], rows: int, columns: int, type: str) -> Array:
    # [warps, rows, columns] from the words [warps, 32] of a row-major operand: registers go down rows first.
    matrix = np.empty((len(words[0]), rows, columns))
    for k, word in enumerate(words):
        down, across = k % (rows // 8) * 8, k // (rows // 8)
        if type == "tf32":
            matrix[:, ROW + down, COLUMN + 4 * across] = widen(word, type)
        else:
            for half in range(2):
                part = word >> np.uint32(16 * half) & np.uint32(0xFFFF)
                matrix[:, ROW + down, 2 * COLUMN + half + 8 * across] = widen(part, type)
    return matrix


def _shape(i: Instruction) -> tuple[int, int, int]:
    match = re.search(r"m(\d+)n(\d+)k(\d+)", i.text)
    assert match
    return int(match[1]), int(match[2]), int(match[3])


def _words(warps: Warps, reads: list[Callable[[Warps], Array]]) -> list[Array]:
    return [np.broadcast_to(read(warps), warps.lanes).reshape(-1, 32) for read in reads]


@decodes("mma")
def _mma(i: Instruction) -> Action:
    rows, columns, depth = _shape(i)
    type = i.modifiers[-2]
    if i.modifiers[3:5] != ("row", "col") or (rows, columns) != (16, 8) or i.modifiers[-1] != "f32":
        raise NotImplementedError(i.text)
    names = registers(i.operands[0])
    a, b, c = ([reader(o, "b32") for o in group] for group in i.operands[1:4])  # type: ignore[union-attr]

    def multiply(warps: Warps, mask: Mask) -> None:
        if mask is not None:
            raise Fault(f"not all threads of a warp take part: {i.text}")
        left = _fragment(_words(warps, a), 16, depth, type)
        right = _fragment(_words(warps, b), 8, depth, type)  # the transpose lies as a row-major operand does
        product = left @ right.transpose(0, 2, 1)
        for k, (name, old) in enumerate(zip(names, _words(warps, c), strict=True)):
            part = product[:, ROW + 8 * (k // 2), 2 * COLUMN + k % 2]
            warps.write(name, (part + old.view(np.float32)).astype(np.float32).view(np.uint32).ravel(), None)

    return multiply


def _rows_of_matrix(warps: Warps, address: Array, number: int, i: Instruction) -> tuple[Array, Array]:
    # Which lanes name the eight rows of a matrix, and where the rows lie.
    lanes = (np.arange(0, warps.lanes, 32)[:, None] + 8 * number + np.arange(8)).ravel()
    mask = np.zeros(warps.lanes, bool)
    mask[lanes] = True
    return mask, shared_offsets(warps, address, 16, mask, i.text)


@decodes("ldmatrix")
def _ldmatrix(i: Instruction) -> Action:
    if i.type != "b16" or "m8n8" not in i.modifiers:
        raise NotImplementedError(i.text)
    names, read, transposed = registers(i.operands[0]), addresses(i.operands[1]), "trans" in i.modifiers

    def load(warps: Warps, mask: Mask) -> None:
        if mask is not None:
            raise Fault(f"not all threads of a warp take part: {i.text}")
        address = read(warps)
        for k, name in enumerate(names):
            naming, offsets = _rows_of_matrix(warps, address, k, i)
            data = warps.launch.shared.load(offsets, 16, warps.who(naming), i.text)
            matrix = data.view(np.uint16).reshape(-1, 8, 8).astype(np.uint32)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            word = matrix[:, ROW, 2 * COLUMN] | matrix[:, ROW, 2 * COLUMN + 1] << np.uint32(16)
            warps.write(name, word.ravel(), None)

    return load


@decodes("stmatrix")
def _stmatrix(i: Instruction) -> Action:
    if i.type != "b16" or "m8n8" not in i.modifiers:
        raise NotImplementedError(i.text)
    group = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
    reads, to, transposed = [reader(o, "b32") for o in group], addresses(i.operands[0]), "trans" in i.modifiers

    def store(warps: Warps, mask: Mask) -> None:
        if mask is not None:
            raise Fault(f"not all threads of a warp take part: {i.text}")
        address = to(warps)
        for k, word in enumerate(_words(warps, reads)):
            matrix = np.empty((len(word), 8, 8), np.uint16)
            for half in range(2):
                matrix[:, ROW, 2 * COLUMN + half] = (word >> np.uint32(16 * half)).astype(np.uint16)
            if transposed:
                matrix = matrix.transpose(0, 2, 1)
            naming, offsets = _rows_of_matrix(warps, address, k, i)
            data = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, 16)
            warps.launch.shared.store(offsets, data, warps.who(naming), i.text)

    return store


def read_tile(
    warps: Warps, descriptor: Array, swizzle: Array, rows: Array, columns: int, type: str, text: str
) -> Array:
    """[warps, rows, columns] of a K-major operand in shared memory.

    One descriptor and one number of the swizzle a warp; rows [warps or 1, rows]. Eight rows make a group, and groups
    lie `stride` bytes apart. In a group a row takes as many bytes as the swizzle spans (without one 16, and what
    follows in a row lies `leading` bytes on); the swizzle exchanges units of 16 bytes by the address bits above them.
    """
    if len(set(swizzle.tolist())) != 1:
        raise NotImplementedError(f"warps with different swizzles: {text}")
    span = SPANS[int(swizzle[0])]
    fields = [(descriptor >> np.uint64(at) & np.uint64(0x3FFF)).astype(np.int64) << 4 for at in (0, 16, 32)]
    start, leading, stride = (f[:, None, None] for f in fields)
    size = 4 if type == "tf32" else 2
    row, byte = rows[:, :, None], np.arange(columns) * size
    at = start + row // 8 * stride + row % 8 * span
    at = at + (byte if span > 16 else byte // 16 * leading + byte % 16)
    at = at ^ (at >> 7 & (span // 16 - 1)) << 4
    if (at + size > warps.launch.shared_bytes).any():
        raise Fault(f"byte {int(at.max())} in {warps.launch.shared_bytes} bytes of shared memory: {text}")
    lanes = np.repeat(np.arange(0, warps.lanes, 32), at[0].size)
    offsets = at.ravel() + warps.slot[lanes] * warps.launch.shared_bytes
    data = warps.launch.shared.load(offsets, size, warps.who(None)[lanes], text)
    return widen(data.view(f"u{size}")[:, 0], type).reshape(at.shape)


@decodes("wgmma")
def _wgmma(i: Instruction) -> Action:
    if i.modifiers[0] == "fence":
        return lambda warps, mask: None
    if i.modifiers[0] == "commit_group":
        return lambda warps, mask: warps.products.append([])
    if i.modifiers[0] == "wait_group":
        left = i.operands[0]
        assert isinstance(left, Constant)
        return lambda warps, mask: wait(warps, warps.products, left.bits)
    rows, columns, depth = _shape(i)
    type = i.type
    if rows != 64 or any(o != Constant(1) for o in i.operands[4:6]) or any(o != Constant(0) for o in i.operands[6:]):
        raise NotImplementedError(i.text)  # negated or transposed operands
    names = registers(i.operands[0])
    in_registers = isinstance(i.operands[1], tuple)
    a = [reader(o, "b32") for o in i.operands[1]] if in_registers else [reader(i.operands[1], "b64")]  # type: ignore[union-attr]
    b, adds = reader(i.operands[2], "b64"), reader(i.operands[3], "pred")

    def operand_a(warps: Warps, values: tuple[Array, ...]) -> Array:
        if in_registers:
            return _fragment([v.reshape(-1, 32) for v in values], 16, depth, type)
        # A warp multiplies its own sixteen of the 64 rows.
        rows = 16 * (warps.thread[::32].astype(np.int64)[:, None] // 32 % 4) + np.arange(16)
        descriptor = values[0][::32]
        return read_tile(warps, descriptor, descriptor >> np.uint64(62), rows, depth, type, i.text)

    def finish(warps: Warps, right: Array, adding: Array, *left: Array) -> None:
        descriptor = right[::32]
        columns_of_b = np.arange(columns)[None]
        second = read_tile(warps, descriptor, descriptor >> np.uint64(62), columns_of_b, depth, type, i.text)
        product = operand_a(warps, left) @ second.transpose(0, 2, 1)
        for k, name in enumerate(names):
            part = product[:, ROW + 8 * (k // 2 % 2), 8 * (k // 4) + 2 * COLUMN + k % 2].ravel()
            if adding.any():
                part = part + np.where(adding, warps.registers[name].view(np.float32), 0)
            warps.registers[name] = part.astype(np.float32).view(np.uint32)

    def start(warps: Warps, mask: Mask) -> None:
        if mask is not None:
            raise Fault(f"not all threads of a warp take part: {i.text}")
        operands = [np.broadcast_to(read(warps), warps.lanes) for read in (b, adds, *a)]
        warps.products[-1].append(Pending(finish, tuple(operands)))

    return start
