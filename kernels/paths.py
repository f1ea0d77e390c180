"""The orders in which a map's pixels are scanned: one record each, from which every backend, layer and picture derives.

A pattern cuts the map into K groups that are scanned on their own: group k takes every `step`-th pixel, from a first
row and column on, row by row or column by column, forwards or backwards. Maps are padded at the bottom and right to a
multiple of the step, so that all groups have L tokens; padding tokens have zeros for x, but decay the state.

    es2d     EfficientVMamba's four atrous groups with step 2, every pixel in one of them (arXiv 2403.09977, eq. 5)
    ss2d     VMamba's four full-map directions: rows, columns, and both reversed (arXiv 2401.10166)
    forward  one scan along the rows of the map (a plain 1-D scan for H = 1)
    reverse  the same, from the last pixel to the first

A new order is one more entry in `PATTERNS`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Every `step`-th pixel of a map in one order.

    Attributes:
        row: first row, below the pattern's step.
        column: first column, below the pattern's step.
        down: column by column, each from top to bottom; else row by row, each from left to right.
        backwards: the same tokens from the last to the first.
    """

    row: int = 0
    column: int = 0
    down: bool = False
    backwards: bool = False


@dataclass(frozen=True)
class Pattern:
    """A scan order of a whole map.

    Attributes:
        name: how the backends call it, a key of `PATTERNS`.
        groups: the K groups; together they visit every pixel equally often (ValueError otherwise).
        step: distance in rows and in columns between the pixels of a group.
        sets: sets of parameters, a divisor of K; group k has set `k % sets`.
    """

    name: str
    groups: tuple[Group, ...]
    step: int
    sets: int

    def __post_init__(self) -> None:
        starts = sorted((group.row, group.column) for group in self.groups)
        pixels = [(row, column) for row in range(self.step) for column in range(self.step)]
        if not starts or starts != sorted(pixels * self.visits):
            raise ValueError(f"with step {self.step} the groups at {starts} do not visit every pixel equally often")
        if len(self.groups) % self.sets:
            raise ValueError(f"{len(self.groups)} groups cannot share {self.sets} sets of parameters")

    @property
    def visits(self) -> int:
        """Groups that each pixel is a member of."""
        return len(self.groups) // self.step**2

    def size(self, H: int, W: int) -> tuple[int, int]:
        """Rows and columns of a group of a map with H rows and W columns, padding included."""
        return (H + self.step - 1) // self.step, (W + self.step - 1) // self.step

    def length(self, H: int, W: int) -> int:
        """L: tokens of a group, padding tokens included."""
        rows, columns = self.size(H, W)
        return rows * columns

    def paths(self, H: int, W: int, device: torch.device | str = "cpu") -> Tensor:
        """Pixel index `row * W + column` of every token: int32 `[K, L]`, -1 for padding."""
        rows, columns = self.size(H, W)
        pixels = torch.arange(H * W, dtype=torch.int32, device=device).view(H, W)
        pixels = torch.nn.functional.pad(pixels, (0, columns * self.step - W, 0, rows * self.step - H), value=-1)
        paths = []
        for group in self.groups:
            tokens = pixels[group.row :: self.step, group.column :: self.step]
            tokens = (tokens.t() if group.down else tokens).flatten()
            paths.append(tokens.flip(0) if group.backwards else tokens)
        return torch.stack(paths)


_FOUR_WAYS = (Group(), Group(down=True), Group(backwards=True), Group(down=True, backwards=True))
PATTERNS = {
    pattern.name: pattern
    for pattern in (
        Pattern("es2d", (Group(0, 0), Group(1, 0, down=True), Group(0, 1), Group(1, 1, down=True)), step=2, sets=4),
        Pattern("ss2d", _FOUR_WAYS, step=1, sets=4),
        Pattern("forward", (Group(),), step=1, sets=1),
        Pattern("reverse", (Group(backwards=True),), step=1, sets=1),
    )
}


def es2d_pattern(step: int) -> Pattern:
    """The groups of ES2D with any atrous step p, 1 or even; ValueError for others.

    Step 2 is the published networks'. The rest is our reading of the paper's parameter p: an even step has p^2 groups,
    of which those with row and column offsets (r, c) have the parameters and the order of group (r mod 2, c mod 2) of
    step 2; step 1 has one group, the whole map row by row.
    """
    if step == 1:
        return PATTERNS["forward"]
    if step < 1 or step % 2:
        raise ValueError(f"the atrous step must be 1 or even, not {step}")
    base = PATTERNS["es2d"]
    if step == base.step:
        return base
    blocks = [(row, column) for row in range(0, step, 2) for column in range(0, step, 2)]
    groups = tuple(replace(g, row=row + g.row, column=column + g.column) for row, column in blocks for g in base.groups)
    return replace(base, groups=groups, step=step)


def pattern_named(name: str) -> Pattern:
    """The entry of `PATTERNS`; ValueError if there is none."""
    if name not in PATTERNS:
        raise ValueError(f"unknown scan pattern {name!r}, expected one of {', '.join(PATTERNS)}")
    return PATTERNS[name]


def path_length(H: int, W: int, pattern: str) -> int:
    """Tokens of a group of the pattern of this name, padding tokens included."""
    return pattern_named(pattern).length(H, W)


def scan_paths(H: int, W: int, pattern: str, device: torch.device | str = "cpu") -> Tensor:
    """`Pattern.paths` of the pattern of this name."""
    return pattern_named(pattern).paths(H, W, device)


def fold_step(x: Tensor, step: int) -> Tensor:
    """Turn a map into several whose ES2D with step 2 is the map's ES2D with an even `step` p.

    With step p every p-th row and column make a group: p^2 groups, on a map that zeros fill up to a multiple of p at
    the bottom and right. Group (r, c) of row and column offsets has the parameters and the order of group
    (r mod 2, c mod 2) of step 2, so those rows and columns that leave 2a or 2a + 1, and 2b or 2b + 1, when divided by
    p, are scanned like a map of their own. `[B, H, W, D]` becomes `[B (p/2)^2, 2 ceil(H/p), 2 ceil(W/p), D]`.
    """
    B, H, W, D = x.shape
    half = step // 2
    x = torch.nn.functional.pad(x, (0, 0, 0, -W % step, 0, -H % step))
    rows, columns = x.shape[1] // step, x.shape[2] // step
    x = x.view(B, rows, half, 2, columns, half, 2, D)
    return x.permute(0, 2, 5, 1, 3, 4, 6, 7).reshape(B * half**2, 2 * rows, 2 * columns, D)


def unfold_step(y: Tensor, step: int, H: int, W: int) -> Tensor:
    """The map `[B, H, W, D]` that :func:`fold_step` took apart."""
    half = step // 2
    rows, columns, D = y.shape[1] // 2, y.shape[2] // 2, y.shape[3]
    y = y.view(y.shape[0] // half**2, half, half, rows, 2, columns, 2, D).permute(0, 3, 1, 4, 5, 2, 6, 7)
    return y.reshape(y.shape[0], rows * step, columns * step, D)[:, :H, :W]
