"""EfficientVMamba: the trunk with a classifier, or as a feature pyramid.

Source: EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, arXiv 2403.09977, figure 3 and table 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from timm.models import FeatureInfo
from torch import Tensor, nn

from evmamba.backbone import takes_fields_of
from evmamba.blocks import to_channels_first, to_channels_last, token_norm
from evmamba.errors import UserError, unknown_name
from evmamba.trunk import Trunk, TrunkOptions

PAPER_URL = "https://arxiv.org/abs/2403.09977"
GLOBAL_POOLS = ("avg", "")


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
        x = to_channels_first(token_norm(self.norm, to_channels_last(x)))
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
        sizes, options: dims, depths, in_chans and so on, the fields of `TrunkOptions`.
        num_classes: outputs of the classifier, 0 for none.
        drop_rate: dropout before the classifier.
        global_pool: `"avg"`, or `""` for none.

    Raises:
        UserError: sizes or options that make no network; in `forward`, images too small or with other channels.
    """

    @takes_fields_of(TrunkOptions)
    def __init__(
        self,
        *sizes: Sequence[int],
        num_classes: int = 1000,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **options: Any,
    ) -> None:
        super().__init__(TrunkOptions(*sizes, **options))
        dim = self.options.dims[-1]
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dim
        self.feature_info = self.feature_dicts()
        self.head = Head(dim, num_classes, global_pool=global_pool, drop_rate=drop_rate)
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
            maps[-1] = token_norm(self.head.norm, final)
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
    stage and ceil(h/2) at each next one. Saved, pushed and pulled as `EfficientVMamba` is.

    `feature_info.channels()` and `feature_info.reduction()` describe the maps, as timm's do.

    Args:
        sizes, options: dims, depths, in_chans and so on, the fields of `TrunkOptions`.
        out_indices: stages whose maps are returned, or how many of the last ones; later stages are not built.
    """

    @takes_fields_of(TrunkOptions)
    def __init__(self, *sizes: Sequence[int], out_indices: int | Sequence[int] = (0, 1, 2, 3), **options: Any) -> None:
        given = TrunkOptions(*sizes, **options)
        taken = _stage_indices(out_indices, len(given.dims))
        super().__init__(given, last_stage=max(taken))
        self.out_indices = taken
        self.feature_info = FeatureInfo(self.feature_dicts(), taken)
        for i in taken:
            self.add_module(f"outnorm{i}", nn.LayerNorm(given.dims[i]))
        self.apply(_init_linear)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = list(self.stage_maps(x, len(self.stages) - 1))
        return [to_channels_first(token_norm(self.get_submodule(f"outnorm{i}"), maps[i])) for i in self.out_indices]


def _init_linear(module: nn.Module) -> None:
    # Convolutions and BatchNorm keep PyTorch's defaults; ES2D initialises the parameters of its scan itself.
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _stage_indices(out_indices: int | Sequence[int], stages: int) -> tuple[int, ...]:
    # As in timm, an int means so many of the last stages, and negative numbers count from the end.
    wanted = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    taken = [i + stages if i < 0 else i for i in wanted]
    if not taken or not all(0 <= i < stages for i in taken) or len(set(taken)) < len(taken):
        raise UserError(f"out_indices {out_indices} must name different stages of 0..{stages - 1}")
    return tuple(sorted(taken))
