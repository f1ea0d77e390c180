"""Layers of EfficientVMamba: ES2D, the EVSS block with its shared squeeze-excitation, InRes block, patch merging.

Source: EfficientVMamba, arXiv 2403.09977, section 4 (ES2D: eq. 5, EVSS block: eq. 6) and the published code, which
decides where the text is silent (biases, epsilons, the order of the scans).

Tokens are channels-last `[B, H, W, C]`. Convolutions see them through a permuted view, which PyTorch knows as the
`channels_last` memory format of `[B, C, H, W]`: nothing is copied between a linear layer and a convolution.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from evmamba.errors import UserError, unknown_name
from evmamba.kernels import (
    Linear,
    Norm,
    affine,
    affine_relu,
    batch_norm_depthwise,
    batch_norm_linear,
    batch_statistics,
    convolved_scan,
    depthwise_conv,
    es2d_scan,
    folded,
    has_kernels,
    kernel_backend,
    layer_norm,
    norm_gate,
    norm_linear,
    normalise,
    pattern_scan,
    squeeze_and_excite,
    squeeze_excite_add,
)
from evmamba.kernels.paths import PATTERNS, Pattern, es2d_pattern
from evmamba.kernels.reference import step_sizes

Scan = str  # a key of PATTERNS

STEP_SIZE_RANGE = (1e-3, 1e-1)
STEP_SIZE_FLOOR = 1e-4


def to_channels_first(x: Tensor) -> Tensor:
    """View tokens `[B, H, W, C]` as `[B, C, H, W]` in the channels_last memory format."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """View a map `[B, C, H, W]` as tokens `[B, H, W, C]`."""
    return x.permute(0, 2, 3, 1)


def compute_type(x: Tensor) -> torch.dtype:
    """The type that a linear layer computes in when it is given x: autocast's, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def token_norm(norm: nn.Module, x: Tensor, *, before_linear: bool = False) -> Tensor:
    """LayerNorm of tokens `[B, H, W, C]`, in the type that autocast gives it (float32).

    Layers that come next may round its result to their own type, `before_linear`: kernels write it in that type.
    """
    if not isinstance(norm, nn.LayerNorm) or not has_kernels(x):
        return norm(x)
    dtype = compute_type(x)
    if not before_linear and torch.is_autocast_enabled(x.device.type):
        dtype = torch.float32
    return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Tensor:
    """A 1x1 convolution of tokens `[B, H, W, C]` as a linear layer, whose product adds the bias itself.

    With `relu` too, where the product can do that as well (without gradients).
    """
    weight = weight.flatten(1)
    if not relu or bias is None or torch.is_grad_enabled():
        y = affine(x, weight, bias)
        return F.relu(y) if relu else y
    dtype = compute_type(x)
    return affine_relu(x.to(dtype), weight.to(dtype), bias.to(dtype))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for a module to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def evaluated(norm: nn.Module) -> Norm | None:
    """What kernels of a CPU need of a BatchNorm in evaluation.

    None for other norms, and where somebody's hooks wait for this one.
    """
    if type(norm) is not nn.BatchNorm2d or norm.training or has_hooks(norm):
        return None
    mean, var = norm.running_mean, norm.running_var
    if not norm.affine or mean is None or var is None:
        return None
    weight, bias = norm.weight, norm.bias
    if not mean.dtype == var.dtype == weight.dtype == bias.dtype == torch.float32:
        return None
    return Norm(mean, var, weight, bias, norm.eps)


def normed_pointwise(x: Tensor, conv: nn.Conv2d, norm: nn.Module, *, relu: bool = False) -> Tensor:
    """A 1x1 convolution of tokens `[B, H, W, C]`, the norm after it, and a ReLU if asked for, by kernels of a CPU.

    A BatchNorm is folded into the weight in each pass, or has a kernel where the weight has more numbers than the map
    that is normalised. `fuse` has folded it once, and left an identity.
    """
    if isinstance(norm, nn.Identity):
        return pointwise(x, conv.weight, conv.bias, relu=relu)
    weight, own = conv.weight, evaluated(norm)
    # weight[0].numel() <= x[..., 0].numel(), without making views.
    if own is not None and weight.dtype == x.dtype and weight.numel() * x.shape[-1] <= x.numel() * len(weight):
        return pointwise(x, *folded(weight, conv.bias, own), relu=relu)
    y = pointwise(x, weight, conv.bias)
    return normalised(norm, y, relu=relu) if own is None else normalise(y, own, relu)


def normalised(norm: nn.Module, x: Tensor, *, relu: bool = False) -> Tensor:
    """A norm of maps, of tokens x `[B, H, W, C]`, and a ReLU if asked for."""
    y = norm(to_channels_first(x))
    return to_channels_last(F.relu(y, inplace=True) if relu else y)  # before it is a view, which has to be copied back


def statistics_of_batch(norm: nn.Module, x: Tensor) -> Tensor | None:
    """What `batch_norm_linear` and `batch_norm_depthwise` take of tokens x in place of `norm`, whose running statistics
    follow as in its own forward; None where they cannot: without kernels or gradients, in evaluation, for other norms.
    """
    if type(norm) is not nn.BatchNorm2d or not norm.training or not torch.is_grad_enabled() or not has_kernels(x):
        return None
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if not norm.affine or norm.momentum is None or mean is None or var is None or x[..., 0].numel() < 2:
        return None
    if batches is not None:
        batches.add_(1)
    return batch_statistics(x.detach(), mean, var, norm.momentum, norm.eps)


class ES2D(nn.Module):
    """Gated selective scan over an image with atrous sampling (EfficientVMamba, section 4.1, eq. 5).

    A linear layer splits each token in a signal and a gate of `D = expand * dim` channels; the signal passes a
    depthwise convolution and the scan, is normalised, multiplied by the gate and projected back.

    Shapes: `[B, H, W, dim] -> [B, H, W, dim]`, any height and width; output in the type of the projections.

    Args:
        dim: channels of the tokens.
        state_dim: size N of the state of each inner channel.
        expand: inner channels per channel.
        scan: `"es2d"`, the four atrous groups, `"ss2d"`, VMamba's four directions over the full map (table 5), or
            another order of `kernels.paths.PATTERNS`.
        step: atrous step p of `"es2d"`, 1 or even; the published networks have 2. Step 1 has one group and set of
            parameters in place of four.
    """

    def __init__(self, dim: int, *, state_dim: int = 16, expand: int = 2, scan: Scan = "es2d", step: int = 2) -> None:
        super().__init__()
        if scan not in PATTERNS:
            raise unknown_name("scan", scan, PATTERNS)
        if scan != "es2d" and step != 2:
            raise UserError(f"scan '{scan}' has no step to choose, step={step} is for 'es2d'")
        self.scan = scan
        self.step = step
        inner, rank, groups = expand * dim, math.ceil(dim / 16), self.pattern.sets
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(groups, rank + 2 * state_dim, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(groups, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(groups, inner))
        self.A_logs = nn.Parameter(torch.empty(groups * inner, state_dim))
        self.Ds = nn.Parameter(torch.empty(groups * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters of the scan as Mamba does (arXiv 2312.00752, section 3.6)."""
        _, inner, rank = self.dt_projs_weight.shape
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        draw_step_bias_(self.dt_projs_bias)
        self.A_logs.copy_(torch.arange(1, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    @property
    def pattern(self) -> Pattern:
        """The groups in which the layer scans a map. Raises UserError for a step that ES2D is not defined for."""
        if self.scan != "es2d":
            return PATTERNS[self.scan]
        try:
            return es2d_pattern(self.step)
        except ValueError as error:
            raise UserError(str(error)) from None

    def token_order(self, H: int, W: int) -> Tensor:
        """Pixel index `row * W + column` of every token of a map, in the order of the scan.

        int32 `[K, L]`: K groups of L tokens; -1 where the map is padded.
        """
        return self.pattern.paths(H, W)

    def step_sizes(self, signal: Tensor) -> Tensor:
        """Delta by which the scan of a signal `[B, H, W, D]` steps: `[B, K, L, D]` in the order of `token_order`."""
        return step_sizes(signal, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.pattern)

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        kernels, norm, projection = has_kernels(signal), self.out_norm, self.out_proj
        y = self._convolve_and_scan(signal, kernels)
        if kernels and type(projection) in (nn.Linear, Linear):
            return norm_linear(y, gate, norm.weight, norm.bias, projection.weight, norm.eps)
        return projection(norm_gate(y, gate, norm.weight, norm.bias, norm.eps))

    def signal_and_gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is scanned, and what the scan's result is multiplied by (before SiLU); both `[B, H, W, D]`."""
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        return self._convolve(signal), gate

    def _convolve_and_scan(self, signal: Tensor, kernels: bool) -> Tensor:
        conv, pattern = self.conv2d, self.pattern
        if kernels and pattern.step == PATTERNS[pattern.name].step:
            return convolved_scan(signal, conv.weight, conv.bias, *self._scan_parameters(), pattern.name)
        return self._scan(self._convolve(signal))

    def _convolve(self, signal: Tensor) -> Tensor:
        if has_kernels(signal):
            return depthwise_conv(signal, self.conv2d.weight, self.conv2d.bias, "silu")
        return F.silu(to_channels_last(self.conv2d(to_channels_first(signal))))

    def _scan(self, x: Tensor) -> Tensor:
        if self.scan == "es2d":
            return es2d_scan(x, *self._scan_parameters(), step=self.step)
        return pattern_scan(x, *self._scan_parameters(), self.pattern.name)

    def _scan_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds

    def extra_repr(self) -> str:
        return f"scan={self.scan}, step={self.step}"


@torch.no_grad()
def draw_step_bias_(bias: Tensor) -> None:
    """Fill the bias of a scan's step projection so that softplus gives log-uniform steps, as Mamba does."""
    low, high = (math.log(bound) for bound in STEP_SIZE_RANGE)
    step_size = torch.empty_like(bias).uniform_(low, high).exp_().clamp_(min=STEP_SIZE_FLOOR)
    bias.copy_(step_size + torch.log(-torch.expm1(-step_size)))  # inverse of softplus


class TokenSqueezeExcite(nn.Module):
    """Channel attention on tokens `[B, H, W, C]`: `u * sigmoid(W2 gelu(W1 mean(LayerNorm(u))))`.

    The normalised map feeds the gate only; what is scaled is the map as it came, as in the published code.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduce = nn.Linear(dim, dim // 8)
        self.expand = nn.Linear(dim // 8, dim)

    def forward(self, u: Tensor) -> Tensor:
        squeezed = self.norm(u).mean(dim=(1, 2), keepdim=True)
        return u * self.expand(F.gelu(self.reduce(squeezed))).sigmoid()


class ConvBranch(nn.Sequential):
    """Local branch of the EVSS block on `[B, C, H, W]`: depthwise 3x3, BatchNorm, GELU, 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.GELU()
        self.pointwise = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := kernel_backend(x)) is None:
            return super().forward(x)
        tokens, conv, norm, last = to_channels_last(x), self.depthwise, self.norm, self.pointwise
        own = evaluated(norm) if kernels == "numba" else None
        if own is not None or isinstance(norm, nn.Identity):
            y = depthwise_conv(tokens, conv.weight, conv.bias, "gelu", own)
        else:
            y = depthwise_conv(tokens, conv.weight, conv.bias)
            if (stats := statistics_of_batch(norm, y)) is not None:
                projection = last.weight.flatten(1), last.bias
                return to_channels_first(batch_norm_linear(y, stats, norm.weight, norm.bias, "gelu", *projection))
            y = to_channels_last(self.act(norm(to_channels_first(y))))
        return to_channels_first(pointwise(y, last.weight, last.bias))


class EVSSBlock(nn.Module):
    """Efficient visual state space block (EfficientVMamba, section 4.2, eq. 6) on tokens `[B, H, W, C]`.

    `x + DropPath(SE(ES2D(n)) + SE(Conv(n)))` with `n = LayerNorm(x)`; one SE module serves both branches.

    Args:
        dim: channels.
        drop_path: probability that a sample skips the block in training.
        state_dim: size N of the scan's state.
        scan: see :class:`ES2D`.
        step: see :class:`ES2D`.
        fusion: without it the block is `x + DropPath(ES2D(n))` (table 5).
    """

    def __init__(
        self,
        dim: int,
        *,
        drop_path: float = 0.0,
        state_dim: int = 16,
        scan: Scan = "es2d",
        step: int = 2,
        fusion: bool = True,
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.norm = nn.LayerNorm(dim)
        self.global_branch = ES2D(dim, state_dim=state_dim, scan=scan, step=step)
        if fusion:
            self.local_branch = ConvBranch(dim)
            self.se = TokenSqueezeExcite(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        n = token_norm(self.norm, x, before_linear=True)
        if not self.fusion:
            return x + self.drop_path(self.global_branch(n))
        local = to_channels_last(self.local_branch(to_channels_first(n)))
        if has_kernels(x, x.shape[-1]):
            return self._add_gated(x, self.global_branch(n), local)
        return x + self.drop_path(self.se(self.global_branch(n)) + self.se(local))

    def _add_gated(self, x: Tensor, wide: Tensor, local: Tensor) -> Tensor:
        """The same in one operator."""
        se, keep = self.se, None
        if self.training and self.drop_path.drop_prob:
            keep = self.drop_path(x.new_ones(len(x), 1, 1, 1, dtype=torch.float32)).flatten()
        gate = (se.norm.weight, se.norm.bias, se.reduce.weight, se.reduce.bias, se.expand.weight, se.expand.bias)
        return squeeze_excite_add(x, wide, local, *gate, keep, se.norm.eps)


class SqueezeExcite(nn.Module):
    """Channel attention on `[B, C, H, W]`: `u * sigmoid(W2 relu(W1 mean(u)))`, squeezed to `reduced` channels."""

    def __init__(self, dim: int, reduced: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(dim, reduced, 1)
        self.expand = nn.Conv2d(reduced, dim, 1)

    def forward(self, u: Tensor) -> Tensor:
        return u * self.expand(F.relu(self.reduce(self.pool(u)))).sigmoid()

    def gate(self, u: Tensor) -> Tensor:
        """What tokens u `[B, H, W, C]` are multiplied by, `[B, 1, 1, C]`."""
        squeezed = to_channels_last(self.pool(to_channels_first(u)))
        squeezed = pointwise(squeezed, self.reduce.weight, self.reduce.bias, relu=True)
        return pointwise(squeezed, self.expand.weight, self.expand.bias).sigmoid()


class InvertedResidual(nn.Module):
    """Inverted residual (InRes) block with squeeze-excitation on `[B, C, H, W]` (section 4.3, MobileNetV3's block).

    Args:
        dim: channels in and out.
        drop_path: probability that a sample skips the block in training.
        expand: width of the depthwise convolution in units of `dim`.
        se_ratio: squeezed width as a part of the *expanded* width.
    """

    def __init__(self, dim: int, *, drop_path: float = 0.0, expand: int = 4, se_ratio: float = 0.125) -> None:
        super().__init__()
        wide = expand * dim
        self.expand = nn.Conv2d(dim, wide, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(wide)
        self.se = SqueezeExcite(wide, int(wide * se_ratio))
        self.project = nn.Conv2d(wide, dim, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        kernels = kernel_backend(x)
        if kernels == "numba":
            return self._inferred(x)
        if kernels is not None:
            return self._with_kernels(x)
        y = F.relu(self.expand_norm(self.expand(x)), inplace=True)
        y = F.relu(self.depthwise_norm(self.depthwise(y)), inplace=True)
        y = self.project_norm(self.project(self.se(y)))
        return x + self.drop_path(y)

    def _inferred(self, x: Tensor) -> Tensor:
        """The same on tokens by kernels of a CPU, which do what a norm does in evaluation."""
        y, conv, norm, se = to_channels_last(x), self.depthwise, self.depthwise_norm, self.se
        y = normed_pointwise(y, self.expand, self.expand_norm, relu=True)
        if (own := evaluated(norm)) is not None or isinstance(norm, nn.Identity):
            y = depthwise_conv(y, conv.weight, conv.bias, "relu", own)
        else:
            y = normalised(norm, depthwise_conv(y, conv.weight, conv.bias), relu=True)
        if type(se.pool) is nn.AdaptiveAvgPool2d and not has_hooks(se.pool):
            y = squeeze_and_excite(y, se.reduce.weight, se.reduce.bias, se.expand.weight, se.expand.bias)
        else:
            y = y * se.gate(y)
        y = normed_pointwise(y, self.project, self.project_norm)
        return x + self.drop_path(to_channels_first(y))

    def _with_kernels(self, x: Tensor) -> Tensor:
        """The same on tokens by a GPU's kernels; where `fuse` has folded a norm, the convolution has the ReLU too."""
        tokens, conv, norm = to_channels_last(x), self.expand, self.expand_norm
        fused = isinstance(norm, nn.Identity)
        y = pointwise(tokens, conv.weight, conv.bias, relu=fused)
        conv = self.depthwise
        if conv.bias is None and (stats := statistics_of_batch(norm, y)) is not None:
            y, fused = batch_norm_depthwise(y, stats, norm.weight, norm.bias, "relu", conv.weight), False
        else:
            y = y if fused else normalised(norm, y, relu=True)
            fused = isinstance(self.depthwise_norm, nn.Identity)
            y = depthwise_conv(y, conv.weight, conv.bias, "relu" if fused else "none")
        conv, norm, se = self.project, self.depthwise_norm, self.se
        if (stats := statistics_of_batch(norm, y)) is not None:
            gate_network = (t for layer in (se.reduce, se.expand) for t in (layer.weight.flatten(1), layer.bias))
            squeeze = tuple(t for t in gate_network if t is not None)
            projection = conv.weight.flatten(1), conv.bias
            y = batch_norm_linear(y, stats, norm.weight, norm.bias, "relu", *projection, squeeze)
        else:
            y = y if fused else normalised(norm, y, relu=True)
            y = pointwise(y * se.gate(y), conv.weight, conv.bias)
        return x + self.drop_path(self.project_norm(to_channels_first(y)))


class PatchMerging(nn.Module):
    """Halve height and width: `[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C']` (Swin Transformer, arXiv 2103.14030).

    An odd height or width is padded with zeros at the bottom or right; the four phases (0,0), (1,0), (0,1), (1,1)
    (row, column) are concatenated, normalised and projected.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        # An exported graph pads always (by 0 or 1), so that it serves even and odd sizes.
        if torch.compiler.is_exporting() or h % 2 or w % 2:
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        if not has_kernels(x):
            phases = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
            return self.reduction(token_norm(self.norm, torch.cat(phases, dim=-1), before_linear=True))
        # One copy of the map in each direction; the gradient of four slices would be four maps and their sum.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        norm, reduction = self.norm, self.reduction
        if isinstance(norm, nn.LayerNorm) and type(reduction) in (nn.Linear, Linear):
            return norm_linear(x, None, norm.weight, norm.bias, reduction.weight, norm.eps)
        return reduction(token_norm(norm, x, before_linear=True))
