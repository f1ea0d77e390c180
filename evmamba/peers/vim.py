"""Vision Mamba (Vim): a plain network of bidirectional selective scans over the sequence of patches.

Source: Vision Mamba, arXiv 2401.09417, and its published code: the variant with the class token in the middle, absolute
position embedding and "bimamba v2" (the backward branch has parameters of its own; the branches are averaged). Module
names are the original's, so its checkpoints need no translation.

Shape letters: B batch, h and w rows and columns of patches, L = h w + 1 tokens with the class token, C channels,
D = 2 C inner channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evmamba.backbone import Backbone, Options, takes_fields_of
from evmamba.blocks import draw_step_bias_
from evmamba.errors import UserError
from evmamba.kernels import Linear, selective_scan_1d

PATCH = 16
STRIDES = (4, 8, 16, 32)


class BidirectionalScan(nn.Module):
    """Gated selective scan of a sequence `[B, L, C]` in both directions (Vim, algorithm 1)."""

    def __init__(self, dim: int, *, state_dim: int = 16, kernel_size: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        self.A_log, self.A_b_log = (nn.Parameter(torch.empty(inner, state_dim)) for _ in range(2))
        self.D, self.D_b = (nn.Parameter(torch.ones(inner)) for _ in range(2))
        self.conv1d, self.conv1d_b = (nn.Conv1d(inner, inner, kernel_size, groups=inner) for _ in range(2))
        self.x_proj, self.x_proj_b = (nn.Linear(inner, rank + 2 * state_dim, bias=False) for _ in range(2))
        self.dt_proj, self.dt_proj_b = (nn.Linear(rank, inner) for _ in range(2))
        self.out_proj = Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the parameters of the scans as Mamba does (arXiv 2312.00752, section 3.6)."""
        for A_log, dt_proj in ((self.A_log, self.dt_proj), (self.A_b_log, self.dt_proj_b)):
            A_log.copy_(torch.arange(1, A_log.shape[1] + 1).log().expand_as(A_log))
            bound = dt_proj.in_features**-0.5
            nn.init.uniform_(dt_proj.weight, -bound, bound)
            draw_step_bias_(dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.in_proj(x).chunk(2, dim=-1)
        signal = signal.transpose(1, 2)
        reach = self.conv1d.kernel_size[0] - 1
        # A causal convolution of the reversed sequence is one with the reversed kernel that looks ahead.
        seen = F.conv1d(F.pad(signal, (reach, 0)), self.conv1d.weight, self.conv1d.bias, groups=len(self.D))
        ahead = F.conv1d(
            F.pad(signal, (0, reach)), self.conv1d_b.weight.flip(-1), self.conv1d_b.bias, groups=len(self.D)
        )
        y = self._scan(seen, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        y = y + self._scan(ahead, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        return self.out_proj((y * F.silu(gate) / 2).to(gate.dtype))

    def _scan(
        self, signal: Tensor, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, skip: Tensor, *, reverse: bool
    ) -> Tensor:
        tokens = F.silu(signal).transpose(1, 2)
        return selective_scan_1d(tokens, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, skip, reverse=reverse)


class VimLayer(nn.Module):
    """`x + DropPath(scan(RMSNorm(x)))` on tokens `[B, L, C]`; the sum stays in at least float32."""

    def __init__(self, dim: int, *, drop_path: float = 0.0, state_dim: int = 16) -> None:
        super().__init__()
        self.mixer = BidirectionalScan(dim, state_dim=state_dim)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x.to(self.norm.weight.dtype))))


@dataclass(frozen=True)
class VimOptions(Options):
    """What makes a Vim; Vim-Ti by default.

    Attributes:
        dim: channels C.
        depth: number of layers.
        in_chans, drop_path_rate: see :class:`evmamba.backbone.Options`.
        image_size: side in pixels that the position embedding is for; it is resized (bicubic) for other images.
        state_dim: size N of the scan's state.

    Raises:
        UserError: sizes that make no network.
    """

    dim: int = 192
    depth: int = 24
    _: KW_ONLY
    image_size: int = 224
    state_dim: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % PATCH or self.image_size < PATCH:
            raise UserError(f"image_size must be a multiple of {PATCH}, not {self.image_size}")


class VimTrunk(Backbone):
    """Patches, class token, position embedding and layers, which classifier and pyramid share."""

    options: VimOptions
    STEMS = ("patch_embed.proj",)
    CLASSIFIER = "head"
    PYRAMID_ONLY = "up."

    def __init__(self, options: VimOptions) -> None:
        super().__init__(options)
        dim = options.dim
        self.grid = options.image_size // PATCH
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(options.in_chans, dim, PATCH, stride=PATCH)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2 + 1, dim))
        rates = torch.linspace(0, options.drop_path_rate, options.depth, device="cpu").tolist()
        self.layers = nn.ModuleList(VimLayer(dim, drop_path=rate, state_dim=options.state_dim) for rate in rates)
        self.norm_f = nn.RMSNorm(dim, eps=1e-5)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the embeddings, and scale down what each layer adds to the sum (as Vim's and Mamba's code do)."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, BidirectionalScan):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))  # PyTorch's default
                module.out_proj.weight.div_(math.sqrt(len(self.layers)))

    def tokens(self, image: Tensor) -> tuple[Tensor, int, int]:
        """Normalised tokens `[B, h w + 1, C]`, the class token at index h w // 2, and h and w.

        Images `[B, in_chans, H, W]` are filled up with zeros to whole patches at the bottom and right.
        """
        self.check_image(image)
        height, width = image.shape[-2:]
        # An exported graph takes all sizes the same way.
        if torch.compiler.is_exporting() or height % PATCH or width % PATCH:
            image = F.pad(image, (0, -width % PATCH, 0, -height % PATCH))
        patches = self.patch_embed["proj"](image)
        h, w = patches.shape[-2:]
        x = _with_middle(patches.flatten(2).transpose(1, 2), self.cls_token.expand(image.shape[0], -1, -1))
        x = x + self._positions(h, w)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), h, w

    def _positions(self, h: int, w: int) -> Tensor:
        if not torch.compiler.is_exporting() and h == w == self.grid:
            return self.pos_embed
        return _resized(self.pos_embed, h, w)

    def adapted_to_input(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        adapted = super().adapted_to_input(weights)
        embedding = weights.get("pos_embed")
        if embedding is None or embedding.ndim != 3 or embedding.shape[1] == self.pos_embed.shape[1]:
            return adapted
        patches = embedding.shape[1] - 1
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            adapted["pos_embed"] = _resized(embedding, self.grid, self.grid)
        return adapted

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that Vim and Mamba advise not to decay: embeddings, A and D of both directions."""
        spared = ("cls_token", "pos_embed", "A_log", "A_b_log", "D", "D_b")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in spared}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group the parameters by depth for layer-wise learning rates (timm's convention)."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f|^up|^head", (99999,))],
        }


class Vim(VimTrunk):
    """Vim image classifier (Ti by default): `[B, in_chans, H, W] -> [B, num_classes]`; the class token is the feature.

    Args:
        sizes, options: dim, depth, in_chans and so on, the fields of :class:`VimOptions`.
        num_classes: outputs of the classifier, 0 ends at the class token `[B, dim]`.
        drop_rate: dropout before the classifier.

    Raises:
        UserError: options that make no network; in `forward`, images with other channels.
    """

    @takes_fields_of(VimOptions)
    def __init__(self, *sizes: int, num_classes: int = 1000, drop_rate: float = 0.0, **options: Any) -> None:
        super().__init__(VimOptions(*sizes, **options))
        self.num_features = self.head_hidden_size = self.options.dim
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier in place, freshly initialised."""
        if num_classes < 0:
            raise UserError(f"num_classes must not be negative, it is {num_classes}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.options.dim, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.to(self.norm_f.weight)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (an identity if `num_classes` is 0)."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens `[B, h w + 1, dim]`, the class token in the middle."""
        return self.tokens(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` of tokens `[B, h w + 1, dim]`; with `pre_logits` the class token."""
        feature = F.dropout(x[:, (x.shape[1] - 1) // 2], self.drop_rate, self.training)
        return feature if pre_logits else self.head(feature)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class VimPyramid(VimTrunk):
    """Vim's last map at strides 4, 8, 16, 32, so that the same detectors and segmentors can stand on it.

    Vim is plain: it has one resolution, stride 16. As in ViTDet's simple feature pyramid (arXiv 2203.16527, section 3),
    the finer maps are that one through transposed convolutions, the coarser one through a max pool. Those have
    parameters of their own, which no classifier's checkpoint holds. Each map `[B, C_i, ceil(H/s), ceil(W/s)]`, with
    dim/4, dim/2, dim and dim channels.

    Args:
        sizes, options: dim, depth, in_chans and so on, the fields of :class:`VimOptions`.
        out_indices: maps that are returned.
    """

    @takes_fields_of(VimOptions)
    def __init__(self, *sizes: int, out_indices: Sequence[int] = (0, 1, 2, 3), **options: Any) -> None:
        super().__init__(VimOptions(*sizes, **options))
        dim = self.options.dim
        taken = tuple(out_indices)
        if not taken or list(taken) != sorted(set(taken) & set(range(len(STRIDES)))):
            raise UserError(f"out_indices {list(taken)} must name different maps of 0..{len(STRIDES) - 1}, in order")
        self.out_indices = taken
        channels = (dim // 4, dim // 2, dim, dim)
        infos = [
            {"num_chs": c, "reduction": s, "module": f"up.{i}"}
            for i, (c, s) in enumerate(zip(channels, STRIDES, strict=True))
        ]
        self.feature_info = FeatureInfo(infos, taken)
        resamplings = (
            lambda: nn.Sequential(_double(dim), LayerNorm2d(dim // 2), nn.GELU(), _double(dim // 2)),
            lambda: _double(dim),
            nn.Identity,
            lambda: nn.MaxPool2d(2, ceil_mode=True),
        )
        self.up = nn.ModuleDict({str(i): resamplings[i]() for i in taken})

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens, h, w = self.tokens(x)
        last = _without(tokens, h * w // 2).transpose(1, 2).unflatten(2, (h, w))
        maps = []
        for i in self.out_indices:
            rows, columns = (math.ceil(side / STRIDES[i]) for side in x.shape[-2:])
            # Without the part that lies over what the image was filled up with.
            maps.append(self.up[str(i)](last)[:, :, :rows, :columns])
        return maps


def _double(dim: int) -> nn.Module:
    return nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)


def _resized(embedding: Tensor, h: int, w: int) -> Tensor:
    """Position embedding of h x w patches, of one `[1, n^2 + 1, C]` of n x n; the class token's is in the middle."""
    n = math.isqrt(embedding.shape[1] - 1)
    middle = n**2 // 2
    patches = _without(embedding, middle).transpose(1, 2).unflatten(2, (n, n))
    resized = F.interpolate(patches.float(), size=(h, w), mode="bicubic", align_corners=False).to(patches.dtype)
    return _with_middle(resized.flatten(2).transpose(1, 2), embedding[:, middle : middle + 1])


def _with_middle(tokens: Tensor, one: Tensor) -> Tensor:
    """Tokens `[B, n, C]` with one more `[B, 1, C]` at index n // 2."""
    middle = tokens.shape[1] // 2
    return torch.cat([tokens[:, :middle], one, tokens[:, middle:]], dim=1)


def _without(tokens: Tensor, index: int) -> Tensor:
    return torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1)
