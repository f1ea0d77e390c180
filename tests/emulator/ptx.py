"""Reads the PTX that Triton compiles a kernel to: one entry, its parameters, and its instructions in order.

The language: NVIDIA's PTX ISA manual, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Register:
    """A virtual register, or a special one such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Constant:
    """A number written in an instruction; for floats their bits."""

    bits: int


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Name:
    """A label, a parameter, or the start of shared memory."""

    text: str


Operand = Register | Constant | Address | Name | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """`@predicate name.modifiers operands`; `wanted` is the predicate's value with which a thread takes part."""

    text: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    wanted: bool

    @property
    def type(self) -> str:
        """The last modifier: in most instructions the type of the operands."""
        return self.modifiers[-1]

    @property
    def opcode(self) -> str:
        """Name and modifiers, without predicate and operands."""
        return ".".join((self.name, *self.modifiers))


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: parameters in order, threads of a CTA, instructions, and where each label points."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_STATEMENT = re.compile(r"(@(?P<negated>!?)(?P<predicate>%?\w+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.S)
_LABEL = re.compile(r"\s*(\$?\w+):(?!:)\s*")


def parse(ptx: str) -> Kernel:
    """The only entry of a PTX module. Raises ValueError where the text is not as Triton writes it."""
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\n\{", ptx, re.S)
    if entry is None:
        raise ValueError("no .entry in this PTX")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    if threads is None:
        raise ValueError(f"{entry[1]} says no number of threads")
    body = re.sub(r"//.*|^\s*\.(loc|pragma|section).*", "", ptx[entry.end() :], flags=re.M)
    instructions, labels = _statements(body)
    parameters = tuple(re.findall(r"(\w+_param_\d+)", entry[2]))
    return Kernel(entry[1], parameters, int(threads[1]), tuple(instructions), labels)


def _statements(body: str) -> tuple[list[Instruction], dict[str, int]]:
    # Inline assembly may open a scope of its own, whose labels and registers no other statement sees.
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes: list[int] = []
    position, opened = 0, 0
    while True:
        body = body[position:].lstrip()
        position = 0
        if body.startswith("{"):
            opened += 1
            scopes.append(opened)
            position = 1
        elif body.startswith("}"):
            if not scopes:
                return instructions, labels
            scopes.pop()
            position = 1
        elif label := _LABEL.match(body):
            labels[_scoped(label[1], scopes)] = len(instructions)
            position = label.end()
        else:
            end = body.index(";")
            position = end + 1
            statement = " ".join(body[:end].split())
            if not statement.startswith("."):
                instructions.append(_instruction(statement, scopes))


def _scoped(name: str, scopes: list[int]) -> str:
    return name if name.startswith(("$", "%")) or not scopes else f"{name}@{scopes[-1]}"


def _instruction(statement: str, scopes: list[int]) -> Instruction:
    match = _STATEMENT.fullmatch(statement)
    if match is None:
        raise ValueError(f"not an instruction: {statement}")
    name, *modifiers = match["opcode"].split(".")
    operands = tuple(_operand(text, scopes) for text in _split(match["operands"]))
    predicate = _scoped(match["predicate"], scopes) if match["predicate"] else None
    return Instruction(statement, name, tuple(modifiers), operands, predicate, not match["negated"])


def _split(text: str) -> list[str]:
    # At commas outside of braces and brackets; the two results of `%r1|%p1` count as operands of their own.
    return [part.strip() for part in re.split(r"[,|](?![^{]*\})(?![^\[]*\])", text) if part.strip()]


def _operand(text: str, scopes: list[int]) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part, scopes) for part in _split(text.strip("{} ")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(_operand(base.strip(), scopes), int(offset.strip() or "0", 0))
    if text.startswith("%"):
        return Register(text)
    if text.startswith("0f"):
        return Constant(int(text[2:], 16))
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        return Constant(int(text, 0))
    return Name(_scoped(text, scopes) if re.fullmatch(r"[a-z]\w*", text) else text)
