"""Reads NVIDIA machine code: instructions with the scheduling fields of their control words, and the loops they form.

cuobjdump comes with Triton. The fields (Volta and newer) were found by others: https://arxiv.org/abs/1804.06826.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_CODE = re.compile(
    r"^\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);"
    r"\s*/\* 0x[0-9a-f]+ \*/\s*/\* 0x([0-9a-f]+) \*/",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: byte in the kernel.
        name: with its modifiers, such as MUFU.EX2.
        operands: as cuobjdump writes them.
        stall: cycles until the warp may issue its next instruction.
        write_barrier: scoreboard 0 to 5 that is up until the result is there; 7 for none.
        read_barrier: scoreboard that is up until the operands were read; 7 for none.
        waits: scoreboards that have to be down before this issues, one bit each.
    """

    address: int
    name: str
    operands: str
    stall: int
    write_barrier: int
    read_barrier: int
    waits: int


@dataclass(frozen=True)
class Code:
    """A kernel's machine code and what a thread of it needs."""

    instructions: tuple[Instruction, ...]
    registers: int
    stack: int

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) address of every loop: where a branch goes back to, and the branch."""
        found = []
        for i in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", i.operands) if i.name.startswith("BRA") else None
            if target and int(target[1], 16) < i.address:
                found.append((int(target[1], 16), i.address))
        return found

    def between(self, first: int, last: int) -> list[Instruction]:
        """The instructions of a loop."""
        return [i for i in self.instructions if first <= i.address <= last]

    def innermost(self) -> list[Instruction]:
        """The shortest loop with exponentials."""
        loops = (self.between(*loop) for loop in self.loops())
        return min((body for body in loops if any(i.name == "MUFU.EX2" for i in body)), key=len, default=[])


def disassemble(cubin: bytes) -> Code:
    """The only kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout

        resources = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
        text = dump("-sass")
    if resources is None:
        raise ValueError("cuobjdump says no registers")
    instructions = []
    for address, name, operands, control_word in _CODE.findall(text):
        control = int(control_word, 16) >> 41
        fields = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        instructions.append(Instruction(int(address, 16), name, operands, *fields))
    return Code(tuple(instructions), int(resources[1]), int(resources[2]))
