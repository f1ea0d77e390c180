"""The orders in which a map's pixels are scanned, as tables of pixel indices.

A pattern is a set of K groups; group k scans L tokens, and token t of group k is pixel `row * W + column` of the map,
or -1 where the map was padded. A table replaces every partition, flip, transpose and merge copy.

    es2d     EfficientVMamba's four atrous groups with step 2, every pixel in one of them (arXiv 2403.09977, eq. 5)
    ss2d     VMamba's four full-map directions: rows, columns, and both reversed
    forward  one scan along the rows of the map (a plain 1-D scan for H = 1)
    reverse  the same, from the last pixel to the first
"""

import torch
from torch import Tensor

# For each pattern: the number of groups and of how many of them a pixel is a member.
GROUPS = {"es2d": 4, "ss2d": 4, "forward": 1, "reverse": 1}
VISITS = {"es2d": 1, "ss2d": 4, "forward": 1, "reverse": 1}


def path_length(H: int, W: int, pattern: str) -> int:
    """Tokens of a group, padding tokens included."""
    return (H + 1) // 2 * ((W + 1) // 2) if pattern == "es2d" else H * W


def scan_paths(H: int, W: int, pattern: str, device: torch.device | str = "cpu") -> Tensor:
    """Pixel index of every token: int32 `[K, L]`, -1 for padding. Raises ValueError for an unknown pattern."""
    pixels = torch.arange(H * W, dtype=torch.int32, device=device).view(H, W)
    if pattern == "es2d":
        padded = torch.nn.functional.pad(pixels, (0, W % 2, 0, H % 2), value=-1)
        groups = [padded[0::2, 0::2], padded[1::2, 0::2].t(), padded[0::2, 1::2], padded[1::2, 1::2].t()]
    elif pattern == "ss2d":
        groups = [pixels, pixels.t(), pixels.flip(0, 1), pixels.t().flip(0, 1)]
    elif pattern == "forward":
        groups = [pixels]
    elif pattern == "reverse":
        groups = [pixels.flip(0, 1)]
    else:
        raise ValueError(f"unknown scan pattern {pattern!r}, expected one of {', '.join(GROUPS)}")
    return torch.stack([group.reshape(-1) for group in groups])


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
