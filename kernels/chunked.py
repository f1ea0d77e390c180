"""The pure-PyTorch backend: any device, no compiler, a backward of its own (reference.py defines what it computes).

The recurrence is walked token by token, but all that does not depend on the previous token is done for a chunk of
tokens at once, in buffers small enough to stay in the cache: exponentials, the products that enter the state, and the
sums over state and channels (as batched matrix products). The forward saves the state before every chunk; the backward
recomputes the others. Only products of decays are formed, never quotients or logarithms, so nothing overflows.

Names: B batch, b batch elements walked together, K groups of L tokens, T tokens of a chunk, D channels, N states, R
rank of the step projection. Values of a token lie as `[L, b, K, ...]`, with a state axis as `[T, b, K, N, D]`: time
comes first, so that a token is one piece of memory, and channels last, so that no vector instruction crosses rows.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .paths import PATTERNS, path_length, scan_paths
from .reference import ALL_WANTED, Wanted, scan_type

CHUNK = 16  # tokens between saved states
LN2 = math.log(2)
# State elements of a token that are walked together: enough for two cores (torch keeps 32768 on one), few enough for
# the caches.
BLOCK = 49_152


def states_shape(B: int, H: int, W: int, D: int, N: int, pattern: str) -> tuple[int, ...]:
    """Shape of the states that the forward saves: one before every chunk."""
    return (path_length(H, W, pattern) + CHUNK - 1) // CHUNK, B, len(PATTERNS[pattern].groups), N, D


def forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor, Ds: Tensor,
    pattern: str, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan `x` `[B, H, W, D]`: `(y [B, H, W, D], states)` in the scan's type; without `save` the states are empty."""
    weights = _Weights.of(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    B, H, W, D = x.shape
    N = A_logs.shape[1]
    y = x.new_empty(x.shape, dtype=weights.A.dtype)
    states = y.new_empty(states_shape(B, H, W, D, N, pattern) if save else (0,))
    order = _order(H, W, pattern, x.device)
    for block in blocks(B, weights.A.numel()):
        tokens = order.gather(x[block]).to(y.dtype)
        steps = _project(tokens, weights)
        y_tokens, _ = walk(steps, weights.A, states[:, block] if save else None)
        y[block] = order.merge(y_tokens.addcmul_(tokens, weights.skip)).view(y[block].shape)
    return y, states


def backward(
    dy: Tensor, x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A_logs: Tensor,
    Ds: Tensor, states: Tensor, pattern: str, wanted: Wanted = ALL_WANTED,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and the five parameters, each in its own type, from dy `[B, H, W, D]` and the saved states.

    Those that are not `wanted` are None and cost nothing.
    """
    parameters = (x_proj_weight, dt_projs_weight, dt_projs_bias, A_logs, Ds)
    want_x, want_x_proj, want_dt_proj, want_bias, want_A, want_skip = wanted
    weights = _Weights.of(x, *parameters)
    d_x_proj, d_dt_proj, d_bias, d_A, d_skip = (
        torch.zeros_like(t) for t in (weights.x_proj, weights.dt_proj, weights.bias, weights.A, weights.skip)
    )
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    order = _order(x.shape[1], x.shape[2], pattern, x.device)
    for block in blocks(x.shape[0], weights.A.numel()):
        tokens, dy_tokens = (order.gather(t[block]).to(weights.A.dtype) for t in (x, dy))
        steps = _project(tokens, weights)
        d_delta, d_u, dB, dC = walk_back(dy_tokens, steps, states[:, block], weights.A, d_A if want_A else None)
        if want_skip:
            d_skip += (dy_tokens * tokens).sum((0, 1))
        d_logit = d_delta.addcmul_(d_u, tokens).mul_(torch.sigmoid(steps.logit))
        if want_bias:
            d_bias += d_logit.sum((0, 1))
        if want_dt_proj:
            d_dt_proj += _weight_gradient(steps.dt_low, d_logit)
        d_proj = torch.cat([_product(d_logit, weights.dt_proj.mT), dB, dC], dim=-1)
        if want_x_proj:
            d_x_proj += _weight_gradient(tokens, d_proj)
        if want_x:
            d_tokens = dy_tokens.mul_(weights.skip).addcmul_(d_u, steps.delta).add_(_product(d_proj, weights.x_proj.mT))
            dx[block] = order.merge(d_tokens).view(dx[block].shape)
    gradients = (dx, d_x_proj.mT, d_dt_proj.mT, d_bias, (d_A * weights.A * LN2).mT, d_skip)
    return tuple(
        gradient.reshape(p.shape).to(p.dtype).contiguous() if want else None
        for gradient, p, want in zip(gradients, (x, *parameters), wanted, strict=True)
    )


@dataclass(frozen=True)
class _Weights:
    """The parameters in the scan's type, shaped to broadcast over tokens and to be multiplied from the right."""

    x_proj: Tensor  # [K, D, R + 2N]
    dt_proj: Tensor  # [K, R, D]
    bias: Tensor  # [K, D]
    A: Tensor  # [K, N, D], in bits: times log2(e)
    skip: Tensor  # [K, D]

    @classmethod
    def of(cls, x: Tensor, x_proj: Tensor, dt_proj: Tensor, bias: Tensor, A_logs: Tensor, Ds: Tensor) -> "_Weights":
        dtype = scan_type(x)
        x_proj, dt_proj = (weight.to(x.dtype).to(dtype).mT for weight in (x_proj, dt_proj))
        # Powers of two are several times faster than torch.exp on some CPUs, and nowhere slower.
        A = -A_logs.to(dtype).exp().view(*bias.shape, -1).mT.contiguous() / LN2
        return cls(x_proj, dt_proj, bias.to(dtype), A, Ds.to(dtype).view(bias.shape))


@dataclass(frozen=True)
class Steps:
    """What the recurrence is made of: h_t = exp(delta_t A) h_{t-1} + B_t u_t, y_t = C_t h_t."""

    delta: Tensor  # [L, b, K, D]
    u: Tensor  # [L, b, K, D], delta x
    Bt: Tensor  # [L, b, K, N]
    Ct: Tensor  # [L, b, K, N]


@dataclass(frozen=True)
class _ProjectedSteps(Steps):
    dt_low: Tensor  # [L, b, K, R]
    logit: Tensor  # [L, b, K, D], delta before softplus


def _project(tokens: Tensor, weights: _Weights) -> _ProjectedSteps:
    R, N = weights.dt_proj.shape[1], weights.A.shape[1]
    dt_low, Bt, Ct = _product(tokens, weights.x_proj).split([R, N, N], dim=-1)
    logit = _product(dt_low, weights.dt_proj).add_(weights.bias)
    delta = _softplus(logit)
    return _ProjectedSteps(delta, delta * tokens, Bt.contiguous(), Ct.contiguous(), dt_low, logit)


def _softplus(v: Tensor) -> Tensor:
    """log(1 + exp(v)) = max(v, 0) + 2 atanh(e / (2 + e)) with e = exp(-|v|): exact for small e, where 1 + e is not.

    torch.nn.functional.softplus takes ten times as long on some CPUs: there its log1p is not vectorised.
    """
    e = v.abs().mul_(-1 / LN2).exp2_()
    return e.div_(e + 2).atanh_().mul_(2).add_(v.clamp(min=0))


def _product(tokens: Tensor, weight: Tensor) -> Tensor:
    """`[L, b, K, I]` times `[K, I, O]`, group by group: `[L, b, K, O]`."""
    return torch.bmm(tokens.flatten(0, 1).transpose(0, 1), weight).transpose(0, 1).unflatten(0, tokens.shape[:2])


def _weight_gradient(tokens: Tensor, d_out: Tensor) -> Tensor:
    """Gradient `[K, I, O]` of the weight in `_product`."""
    return torch.bmm(tokens.flatten(0, 1).permute(1, 2, 0), d_out.flatten(0, 1).transpose(0, 1))


class _Walk:
    """The recurrence, one chunk at a time, in buffers that all chunks share."""

    def __init__(self, steps: Steps, A: Tensor) -> None:
        L, b = steps.u.shape[:2]
        T = min(CHUNK, L)
        self.steps, self.A = steps, A
        self.a = A.new_empty(T, b, *A.shape)  # exp(delta A)
        self.h = A.new_zeros(T + 1, b, *A.shape)  # h[0] is the state before the chunk
        # Taking a view costs as much as a step of a small scan: take them once.
        self.a_of, self.h_of = self.a.unbind(), self.h.unbind()

    def chunk(self, now: slice) -> None:
        """From h[0] to the states after the chunk's tokens."""
        n = now.stop - now.start
        torch.mul(self.steps.delta[now, :, :, None], self.A, out=self.a[:n]).exp2_()
        torch.mul(self.steps.Bt[now, ..., None], self.steps.u[now, :, :, None], out=self.h[1 : n + 1])
        for t in range(n):
            self.h_of[t + 1].addcmul_(self.a_of[t], self.h_of[t])


def walk(steps: Steps, A: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence from end to end: y `[L, b, K, D]` and the state after the last token `[b, K, N, D]`.

    A `[K, N, D]` in bits (times log2(e)). The state before every chunk goes to states `[chunks, b, K, N, D]`, if given.
    """
    N, D = A.shape[1:]
    y = torch.empty_like(steps.u, memory_format=torch.contiguous_format)
    chunks = _Walk(steps, A)
    for c, now in enumerate(_chunks(len(y))):
        if states is not None:
            states[c] = chunks.h_of[0]
        chunks.chunk(now)
        n = now.stop - now.start
        torch.bmm(steps.Ct[now].view(-1, 1, N), chunks.h[1 : n + 1].view(-1, N, D), out=y[now].view(-1, 1, D))
        chunks.h_of[0].copy_(chunks.h_of[n])
    return y, chunks.h_of[0]


def walk_back(
    dy: Tensor, steps: Steps, states: Tensor, A: Tensor, d_A: Tensor | None, d_last: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of delta (through the decay only), u, B and C; that of A is added to d_A, if there is one.

    d_last `[b, K, N, D]` is the gradient of the state after the last token.
    """
    N, D = A.shape[1:]
    dy, u = dy.contiguous(), steps.u.contiguous()
    d_delta, d_u, dB, dC = (torch.empty_like(t) for t in (dy, u, steps.Bt, steps.Ct))
    chunks = _Walk(steps, A)
    g_chunk = torch.empty_like(chunks.a)  # gradient of the state
    g_of = g_chunk.unbind()
    # What the chunk after this one adds to the gradient of this one's last state.
    carry = torch.zeros_like(g_of[0]) if d_last is None else d_last.clone()
    for c, now in reversed(list(enumerate(_chunks(dy.shape[0])))):
        chunks.h_of[0].copy_(states[c])
        chunks.chunk(now)
        n = now.stop - now.start
        a, h_before, h, g = chunks.a[:n], chunks.h[:n], chunks.h[1 : n + 1], g_chunk[:n]
        torch.mul(steps.Ct[now, ..., None], dy[now, :, :, None], out=g)
        g_of[n - 1].add_(carry)
        for t in range(n - 1, 0, -1):
            g_of[t - 1].addcmul_(chunks.a_of[t], g_of[t])
        torch.mul(a[0], g[0], out=carry)
        torch.bmm(dy[now].view(-1, 1, D), h.view(-1, N, D).mT, out=dC[now].view(-1, 1, N))
        torch.bmm(u[now].view(-1, 1, D), g.view(-1, N, D).mT, out=dB[now].view(-1, 1, N))
        torch.bmm(steps.Bt[now].view(-1, 1, N), g.view(-1, N, D), out=d_u[now].view(-1, 1, D))
        d_exponent = a.mul_(h_before).mul_(g)
        torch.sum(torch.mul(d_exponent, A, out=g), dim=3, out=d_delta[now])
        if d_A is not None:
            d_A += d_exponent.mul_(steps.delta[now, :, :, None]).sum((0, 1))
    return d_delta.mul_(LN2), d_u, dB, dC


@dataclass(frozen=True)
class _Order:
    """How the pixels of a map and the tokens of a scan find each other."""

    pixels: Tensor  # [L, 1, K] pixel of every token, 0 for padding
    padding: Tensor | None  # [L, 1, K, 1] True at padding tokens; None without any
    tokens: Tensor  # [V, 2, H W, 1] position and group of the V tokens of every pixel

    def gather(self, x: Tensor) -> Tensor:
        """Tokens `[L, b, K, D]` in scan order of a map `[b, H, W, D]`; zero at padding tokens."""
        b, H, W, D = x.shape
        rows = self.pixels + torch.arange(b, device=x.device)[:, None] * (H * W)
        tokens = x.reshape(-1, D).index_select(0, rows.flatten()).view(*rows.shape, D)
        return tokens if self.padding is None else tokens.masked_fill_(self.padding, 0)

    def merge(self, tokens: Tensor) -> Tensor:
        """Sum of the tokens `[L, b, K, D]` of every pixel: `[b, H W, D]`."""
        _, b, K, D = tokens.shape
        elements = torch.arange(b, device=tokens.device)[:, None]
        flat = tokens.reshape(-1, D)
        first, *others = (flat.index_select(0, ((t * b + elements) * K + k).flatten()) for t, k in self.tokens)
        for other in others:
            first += other
        return first.view(b, -1, D)


@lru_cache(maxsize=64)
def _order(H: int, W: int, pattern: str, device: torch.device) -> _Order:
    with torch.inference_mode(False):
        paths = scan_paths(H, W, pattern, device).t().long().contiguous()  # [L, K]
        K = paths.shape[1]
        padded = paths < 0
        # Every pixel is visited equally often: sorting the tokens by pixel groups them, behind the padding tokens.
        tokens = paths.flatten().argsort(stable=True)[int(padded.sum()) :].view(H * W, PATTERNS[pattern].visits).t()
        return _Order(
            paths.clamp(min=0)[:, None],
            padded[:, None, :, None] if padded.any() else None,
            torch.stack([tokens // K, tokens % K], dim=1),
        )


def blocks(B: int, elements: int) -> Iterator[slice]:
    """Cut the batch so that about BLOCK state elements of a token are walked together."""
    size = max(1, BLOCK // elements)
    return (slice(start, min(start + size, B)) for start in range(0, B, size))


def _chunks(L: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, L)) for start in range(0, L, CHUNK))
