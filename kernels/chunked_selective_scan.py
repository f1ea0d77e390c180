"""The recurrence of `selective_scan.py` by PyTorch's operators, on any device: the walk of `chunked.py`."""

import torch
from torch import Tensor

from .chunked import CHUNK, LN2, Steps, blocks, walk, walk_back


def states_shape(batch: int, channels: int, L: int, N: int, G: int) -> tuple[int, ...]:
    """Shape of the states that the forward saves: one before every chunk."""
    return -(-L // CHUNK), batch, G, N, channels // G


def forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, last_state, states)`; without `save` the states are empty."""
    batch, channels, L = u.shape
    G, N = B.shape[1:3]
    A_bits = _bits(A, G)
    y, last_state = torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(batch, channels, N)
    states = u.new_empty(states_shape(batch, channels, L, N, G) if save else (0,))
    for block in blocks(batch, A.numel()):
        steps, _ = _steps(u[block], delta[block], B[block], C[block])
        y_tokens, state = walk(steps, A_bits, states[:, block] if save else None)
        y[block] = _channels_first(y_tokens)
        last_state[block] = state.mT.flatten(1, 2)
    return y, last_state, states


def backward(
    dy: Tensor, d_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B and C from those of y and of the last state, and the saved states."""
    G = B.shape[1]
    A_bits = _bits(A, G)
    d_A = torch.zeros_like(A_bits)
    du, d_delta, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, B, C))
    for block in blocks(len(u), A.numel()):
        steps, tokens = _steps(u[block], delta[block], B[block], C[block])
        d_state = d_last[block].unflatten(1, (G, -1)).mT
        d_step, d_product, dB_tokens, dC_tokens = walk_back(
            _tokens_first(dy[block], G), steps, states[:, block], A_bits, d_A, d_state
        )
        du[block] = _channels_first(d_product * steps.delta)
        d_delta[block] = _channels_first(d_step.addcmul_(d_product, tokens))
        dB[block], dC[block] = dB_tokens.permute(1, 2, 3, 0), dC_tokens.permute(1, 2, 3, 0)
    return du, d_delta, d_A.mT.flatten(0, 1).contiguous(), dB, dC


def _bits(A: Tensor, G: int) -> Tensor:
    """`[channels, N]` as `[G, N, channels / G]`, times log2(e)."""
    return A.unflatten(0, (G, -1)).mT.contiguous() / LN2


def _steps(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> tuple[Steps, Tensor]:
    tokens, step = (_tokens_first(t, B.shape[1]) for t in (u, delta))
    Bt, Ct = (t.permute(3, 0, 1, 2).contiguous() for t in (B, C))
    return Steps(step, step * tokens, Bt, Ct), tokens


def _tokens_first(t: Tensor, G: int) -> Tensor:
    """`[b, channels, L]` as `[L, b, G, channels / G]`."""
    return t.permute(2, 0, 1).contiguous().unflatten(2, (G, -1))


def _channels_first(t: Tensor) -> Tensor:
    return t.flatten(2).permute(1, 2, 0)
