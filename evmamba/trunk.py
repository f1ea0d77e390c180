"""The trunk of EfficientVMamba: stem and four stages of EVSS or inverted residual blocks.

Source: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, arXiv 2403.09977, figure 3 and table 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evmamba.backbone import Backbone, Options
from evmamba.blocks import (
    ES2D,
    EVSSBlock,
    InvertedResidual,
    PatchMerging,
    Scan,
    to_channels_first,
    to_channels_last,
    token_norm,
)
from evmamba.errors import UserError
from evmamba.original_names import from_original, to_original

MIN_SIZE = 32


@dataclass(frozen=True)
class TrunkOptions(Options):
    """What makes a trunk; EfficientVMamba-T by default.

    Attributes:
        dims: channels of the stages.
        depths: number of blocks of the stages.
        in_chans, drop_path_rate: see :class:`Options`.
        scan: `"es2d"` or `"ss2d"` in the EVSS blocks (table 5).
        fusion: with (True) or without the convolution branch and SE of the EVSS block (table 5).
        layout: kind of block of each stage, E for EVSS and I for InRes (tables 6 and 8).
        state_dim: size N of the scan's state.
        step: atrous step p of ES2D.

    Raises:
        UserError: sizes that make no network.
    """

    dims: Sequence[int] = (48, 96, 192, 384)
    depths: Sequence[int] = (2, 2, 4, 2)
    _: KW_ONLY
    scan: Scan = "es2d"
    fusion: bool = True
    layout: str = "EEII"
    state_dim: int = 16
    step: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "depths", tuple(self.depths))
        if not self.dims or len(self.dims) != len(self.depths) or min(*self.dims, *self.depths) < 1:
            raise UserError(f"dims {list(self.dims)} and depths {list(self.depths)} do not make a network")
        if min(self.dims) < 8:
            raise UserError(f"dims {list(self.dims)}: a stage needs at least 8 channels")
        if len(self.layout) != len(self.dims) or set(self.layout) - {"E", "I"}:
            raise UserError(
                f"layout '{self.layout}' must have a letter E (EVSS) or I (InRes) for each of {len(self.dims)} stages"
            )


class Stem(nn.Module):
    """Cut an image `[B, in_chans, H, W]` in 4x4 patches: tokens `[B, floor(H/4), floor(W/4), dim]`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[2] < MIN_SIZE or image.shape[3] < MIN_SIZE:
            raise UserError(
                f"images must have at least {MIN_SIZE}x{MIN_SIZE} pixels, not {image.shape[2]}x{image.shape[3]}; "
                "resize or pad them"
            )
        return token_norm(self.norm, to_channels_last(self.conv(image)))


class Stage(nn.Module):
    """Blocks at one resolution on tokens `[B, H, W, C]`, and the merging to the next one (None after the last)."""

    def __init__(self, blocks: Sequence[nn.Module], merge: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge
        self.channels_first = isinstance(blocks[0], InvertedResidual)

    def forward(self, x: Tensor, grad_checkpointing: bool = False) -> Tensor:
        """Run the blocks, not the merging: the pyramid takes its maps in between."""
        if self.channels_first:
            x = to_channels_first(x)
        for block in self.blocks:
            x = _checkpointed(block, x) if grad_checkpointing and torch.is_grad_enabled() else block(x)
        return to_channels_last(x) if self.channels_first else x


class Trunk(Backbone):
    """Stem and stages, which the classifier and the feature pyramid share.

    Args:
        options: its sizes and switches.
        last_stage: index of the last stage that is built; the default is all of them.
    """

    options: TrunkOptions
    STEMS = ("stem.conv", "patch_embed.0", "patch_embed.proj")
    CLASSIFIER = "head.fc"
    PYRAMID_ONLY = "outnorm"

    def __init__(self, options: TrunkOptions, last_stage: int | None = None) -> None:
        super().__init__(options)
        self.stem = Stem(options.in_chans, options.dims[0])
        rates = iter(torch.linspace(0, options.drop_path_rate, sum(options.depths), device="cpu").tolist())
        last_stage = len(options.dims) - 1 if last_stage is None else last_stage
        self.stages = nn.ModuleList()
        for i in range(last_stage + 1):
            blocks = [_block(options, i, next(rates)) for _ in range(options.depths[i])]
            merge = PatchMerging(*options.dims[i : i + 2]) if i < last_stage else None
            self.stages.append(Stage(blocks, merge))

    def stage_maps(self, image: Tensor, last_stage: int) -> Iterator[Tensor]:
        """Yield each stage's tokens `[B, h, w, C]`, before their merging, up to stage `last_stage`."""
        self.check_image(image)
        x = self.stem(image)
        for i, stage in enumerate(self.stages):
            x = stage(x, self.grad_checkpointing)
            yield x
            if i == last_stage:
                return
            x = stage.get_submodule("merge")(x)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the parameters that Mamba advises not to decay: A_logs and Ds (the published networks decay A_logs)."""
        return {
            f"{name}.{parameter}"
            for name, module in self.named_modules()
            if isinstance(module, ES2D)
            for parameter in ("A_logs", "Ds")
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group the parameters by depth for layer-wise learning rates (timm's convention)."""
        fine = [
            (r"^stages\.(\d+)\.merge", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^head\.norm|^outnorm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def checkpoint_filter_fn(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {from_original(name): value for name, value in weights.items()}

    def original_names(self) -> dict[str, str]:
        options = self.options
        flat_stages = {i: depth for i, depth in enumerate(options.depths) if options.layout[i] == "I"}
        return {name: to_original(name, flat_stages) for name in self.state_dict()}

    def is_left_out(self, name: str) -> bool:
        built = len(self.stages)
        absent = (f"stages.{built - 1}.merge.", *(f"stages.{i}." for i in range(built, len(self.options.dims))))
        return super().is_left_out(name) or name.startswith(absent)

    def feature_dicts(self) -> list[dict[str, Any]]:
        """Channels and stride of every stage, as timm's `FeatureInfo` takes them."""
        return [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(self.options.dims[: len(self.stages)])
        ]


def _block(options: TrunkOptions, stage: int, drop_path: float) -> nn.Module:
    dim = options.dims[stage]
    if options.layout[stage] == "I":
        return InvertedResidual(dim, drop_path=drop_path)
    return EVSSBlock(
        dim,
        drop_path=drop_path,
        state_dim=options.state_dim,
        scan=options.scan,
        step=options.step,
        fusion=options.fusion,
    )


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    def contexts() -> Contexts:
        return nullcontext(), _frozen_statistics(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics while a block is computed for the second time."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(batches)
