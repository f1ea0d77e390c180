"""EfficientVMamba: stem, four stages of EVSS or inverted residual blocks, classifier or feature pyramid.

Source: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, arXiv 2403.09977, figure 4 and table 1.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evmamba.blocks import (
    ES2D,
    EVSSBlock,
    InvertedResidual,
    PatchMerging,
    Scan,
    to_channels_first,
    to_channels_last,
)
from evmamba.errors import UserError, unknown_name

MIN_SIZE = 32
PAPER_URL = "https://arxiv.org/abs/2403.09977"
GLOBAL_POOLS = ("avg", "")


class Stem(nn.Module):
    """Cut an image `[B, in_chans, H, W]` in 4x4 patches: tokens `[B, floor(H/4), floor(W/4), dim]`."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.conv.in_channels:
            raise UserError(
                f"the model takes images [B, {self.conv.in_channels}, H, W] (in_chans={self.conv.in_channels}), "
                f"not a tensor of shape {list(image.shape)}"
            )
        if image.shape[2] < MIN_SIZE or image.shape[3] < MIN_SIZE:
            raise UserError(
                f"images must have at least {MIN_SIZE}x{MIN_SIZE} pixels, not {image.shape[2]}x{image.shape[3]}; "
                "resize or pad them"
            )
        return self.norm(to_channels_last(self.conv(image)))


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


class Trunk(nn.Module):
    """Stem and stages, which the classifier and the feature pyramid share.

    Args:
        dims: channels of the stages.
        depths: number of blocks of the stages.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this rate at the last.
        scan: `"es2d"` or `"ss2d"` in the EVSS blocks (table 5).
        fusion: with (True) or without the convolution branch and SE of the EVSS block (table 6).
        layout: kind of block of each stage, E for EVSS and I for InRes (table 8).
        state_dim: size N of the scan's state.
        step: atrous step p of ES2D.
        last_stage: index of the last stage that is built; the default is all of them.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        *,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        scan: Scan = "es2d",
        fusion: bool = True,
        layout: str = "EEII",
        state_dim: int = 16,
        step: int = 2,
        last_stage: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(dims, depths, layout, in_chans, drop_path_rate)
        self.dims, self.depths, self.layout = tuple(dims), tuple(depths), layout
        self.in_chans = in_chans
        self.variant: str | None = None  # its name in evmamba.variants, if it has one
        self.pretrained_cfg: dict[str, Any] = {}  # timm's description of input and classifier
        self.default_cfg = self.pretrained_cfg
        self.grad_checkpointing = False
        self.stem = Stem(in_chans, dims[0])
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        last_stage = len(dims) - 1 if last_stage is None else last_stage
        stages = []
        for i, (dim, depth, kind) in enumerate(zip(dims, depths, layout, strict=True)):
            if i > last_stage:
                break
            blocks: list[nn.Module] = []
            for _ in range(depth):
                rate = next(rates)
                if kind == "E":
                    evss = EVSSBlock(dim, drop_path=rate, state_dim=state_dim, scan=scan, step=step, fusion=fusion)
                    blocks.append(evss)
                else:
                    blocks.append(InvertedResidual(dim, drop_path=rate))
            stages.append(Stage(blocks, PatchMerging(dim, dims[i + 1]) if i < last_stage else None))
        self.stages = nn.ModuleList(stages)

    def stage_maps(self, image: Tensor, last_stage: int) -> Iterator[Tensor]:
        """Yield each stage's tokens `[B, h, w, C]`, before their merging, up to stage `last_stage`."""
        x = self.stem(image)
        for i, stage in enumerate(self.stages):
            x = stage(x, self.grad_checkpointing)
            yield x
            if i == last_stage:
                return
            x = stage.get_submodule("merge")(x)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

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

    def _feature_dicts(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(self.dims[: len(self.stages)])
        ]


class Head(nn.Module):
    """Classifier on `[B, C, h, w]`: LayerNorm over the channels, average pool, dropout, linear."""

    def __init__(self, dim: int, num_classes: int, *, global_pool: str = "avg", drop_rate: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.drop_rate = drop_rate
        self.norm = nn.LayerNorm(dim)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in GLOBAL_POOLS:
            raise unknown_name("global_pool", global_pool, GLOBAL_POOLS)
        if num_classes < 0 or (num_classes and not global_pool):
            raise UserError(f"num_classes={num_classes} with global_pool='{global_pool}': a classifier needs a pool")
        self.pool = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()
        self.fc = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        _init_linear(self.fc)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = to_channels_first(self.norm(to_channels_last(x)))
        if isinstance(self.pool, nn.Identity):
            return x
        x = F.dropout(self.pool(x).flatten(1), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)


class EfficientVMamba(
    Trunk,
    PyTorchModelHubMixin,
    library_name="evmamba",
    pipeline_tag="image-classification",
    license="apache-2.0",
    paper_url=PAPER_URL,
):
    """EfficientVMamba image classifier: `[B, in_chans, H, W] -> [B, num_classes]`.

    Images have any size from 32x32 up. With `num_classes=0` the head ends at the pooled features `[B, dims[-1]]`, with
    `global_pool=""` in addition at the normalised map `[B, dims[-1], h, w]`.

    `save_pretrained(folder)`, `push_to_hub(repository)` and `from_pretrained(folder or repository)` are those of
    huggingface_hub's `PyTorchModelHubMixin`: weights as safetensors, the arguments below as config.json.

    Args:
        dims: channels of the stages (table 1; T by default).
        depths: number of blocks of the stages.
        num_classes: outputs of the classifier, 0 for none.
        global_pool: `"avg"`, or `""` for none.
        drop_rate: dropout before the classifier.
        in_chans, drop_path_rate, scan, fusion, layout, state_dim, step: see :class:`Trunk`.

    Raises:
        UserError: sizes or options that make no network; in `forward`, images too small or with other channels.
    """

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 4, 2),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        scan: Scan = "es2d",
        fusion: bool = True,
        layout: str = "EEII",
        state_dim: int = 16,
        step: int = 2,
    ) -> None:
        super().__init__(
            dims,
            depths,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            scan=scan,
            fusion=fusion,
            layout=layout,
            state_dim=state_dim,
            step=step,
        )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.feature_info = self._feature_dicts()
        self.head = Head(self.dims[-1], num_classes, global_pool=global_pool, drop_rate=drop_rate)
        self.apply(_init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map of the last stage `[B, dims[-1], h, w]`, not normalised."""
        *_, tokens = self.stage_maps(x, len(self.stages) - 1)
        return to_channels_first(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` of a map `[B, dims[-1], h, w]`; with `pre_logits` the pooled features."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and the last map unless `intermediates_only` (timm's signature).

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: the last n stages if an int, all if None, else these stages (negative from the end).
            norm: apply the head's LayerNorm to the last stage's map.
            stop_early: do not compute stages after the last wanted one.
            output_fmt: `"NCHW"` or `"NHWC"`.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise unknown_name("output_fmt", output_fmt, ("NCHW", "NHWC"))
        last = len(self.stages) - 1
        taken = _stage_indices(len(self.stages) if indices is None else indices, len(self.stages))
        maps = list(self.stage_maps(x, max(taken) if stop_early else last))
        final = maps[-1]
        if norm and len(maps) == len(self.stages):
            maps[-1] = self.head.norm(final)
        intermediates = [maps[i] if output_fmt == "NHWC" else to_channels_first(maps[i]) for i in taken]
        return intermediates if intermediates_only else (to_channels_first(final), intermediates)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (an identity if `num_classes` is 0)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place, freshly initialised; `global_pool=None` keeps the present pool."""
        if global_pool is None:
            global_pool = "" if isinstance(self.head.pool, nn.Identity) else "avg"
        device, dtype = self.head.norm.weight.device, self.head.norm.weight.dtype
        self.head.reset(num_classes, global_pool)
        self.head.fc.to(device, dtype)
        self.num_classes = num_classes
        # What save_pretrained writes must fit the weights.
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config.update(num_classes=num_classes, global_pool=global_pool)


class FeaturePyramid(
    Trunk,
    PyTorchModelHubMixin,
    library_name="evmamba",
    pipeline_tag="image-feature-extraction",
    license="apache-2.0",
    paper_url=PAPER_URL,
):
    """EfficientVMamba without classifier: images to a list of maps `[B, C, h, w]` at strides 4, 8, 16, 32.

    Images are `[B, in_chans, H, W]`, of any size from 32x32 up. Each map is the output of its stage before the merging,
    through a LayerNorm of its own (`outnorm0..3`), in the channels_last memory format; `h` is floor(H/4) at the first
    stage and ceil(h/2) at each next one. Saved, pushed and pulled as :class:`EfficientVMamba` is.

    `feature_info.channels()` and `feature_info.reduction()` describe the maps, as timm's do.

    Args:
        dims, depths, in_chans, drop_path_rate, scan, fusion, layout, state_dim, step: see :class:`Trunk`.
        out_indices: stages whose maps are returned, or how many of the last ones; later stages are not built.
    """

    def __init__(
        self,
        dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 4, 2),
        *,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        scan: Scan = "es2d",
        fusion: bool = True,
        layout: str = "EEII",
        state_dim: int = 16,
        step: int = 2,
    ) -> None:
        taken = _stage_indices(out_indices, len(dims))
        super().__init__(
            dims,
            depths,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
            scan=scan,
            fusion=fusion,
            layout=layout,
            state_dim=state_dim,
            step=step,
            last_stage=max(taken),
        )
        self.out_indices = taken
        self.feature_info = FeatureInfo(self._feature_dicts(), taken)
        for i in taken:
            self.add_module(f"outnorm{i}", nn.LayerNorm(self.dims[i]))
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list(self.stage_maps(x, len(self.stages) - 1))
        return [to_channels_first(self.get_submodule(f"outnorm{i}")(maps[i])) for i in self.out_indices]


def _init_linear(module: nn.Module) -> None:
    # Convolutions and BatchNorm keep PyTorch's defaults; ES2D initialises the parameters of its scan itself.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_sizes(dims: Sequence[int], depths: Sequence[int], layout: str, in_chans: int, drop_path_rate: float) -> None:
    if not dims or len(dims) != len(depths) or min(*dims, *depths, in_chans) < 1:
        raise UserError(f"dims {list(dims)}, depths {list(depths)} and in_chans {in_chans} do not make a network")
    if min(dims) < 8:
        raise UserError(f"dims {list(dims)}: a stage needs at least 8 channels")
    if len(layout) != len(dims) or set(layout) - {"E", "I"}:
        raise UserError(f"layout '{layout}' must have a letter E (EVSS) or I (InRes) for each of {len(dims)} stages")
    if not 0.0 <= drop_path_rate < 1.0:
        raise UserError(f"drop_path_rate must be in [0, 1), not {drop_path_rate}")


def _stage_indices(out_indices: int | Sequence[int], stages: int) -> tuple[int, ...]:
    # As in timm, an int means so many of the last stages, and negative numbers count from the end.
    wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    taken = [i + stages if i < 0 else i for i in wanted]
    if not taken or not all(0 <= i < stages for i in taken) or len(set(taken)) < len(taken):
        raise UserError(f"out_indices {out_indices} must name different stages of 0..{stages - 1}")
    return tuple(sorted(taken))


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
