"""What every network here is to its loaders, to timm and to the hub."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from evmamba.errors import UserError

Constructor = TypeVar("Constructor", bound=Callable[..., None])


def takes_fields_of(record: type) -> Callable[[Constructor], Constructor]:
    """Show the fields of a dataclass in a constructor's signature, in place of its `*sizes` and `**options`.

    So they stand in the record alone, and still `help()` lists them, `create_model` knows them, and huggingface_hub
    writes them to config.json and takes nothing else from there.
    """

    def decorate(init: Constructor) -> Constructor:
        itself, *own = inspect.signature(init).parameters.values()
        fields = inspect.signature(record).parameters.values()
        positional = [field for field in fields if field.kind is field.POSITIONAL_OR_KEYWORD]
        keywords = [p for p in (*own, *fields) if p.kind is p.KEYWORD_ONLY]
        init.__signature__ = inspect.Signature([itself, *positional, *keywords])  # type: ignore[attr-defined]
        return init

    return decorate


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every network can be told.

    Attributes:
        in_chans: channels of the image.
        drop_path_rate: stochastic depth, growing linearly from 0 at the first block to this rate at the last.

    Raises:
        UserError: sizes that make no network.
    """

    in_chans: int = 3
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.in_chans < 1:
            raise UserError(f"in_chans must be at least 1, not {self.in_chans}")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise UserError(f"drop_path_rate must be in [0, 1), not {self.drop_path_rate}")


class Backbone(nn.Module):
    """Base of all classifiers and feature pyramids.

    Args:
        options: what makes the network, but for its classifier or pyramid.

    Attributes:
        STEMS: names that the convolution that sees the image has in checkpoints, ours first.
        CLASSIFIER: name of the linear classifier, in networks that have one.
        PYRAMID_ONLY: how the names of parameters begin that only feature pyramids have.
        variant: name in `evmamba.variants` that alone makes the network, None if there is none.
        pretrained_cfg, default_cfg: timm's description of input and classifier.
    """

    STEMS: ClassVar[tuple[str, ...]]
    CLASSIFIER: ClassVar[str]
    PYRAMID_ONLY: ClassVar[str]

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.variant: str | None = None
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg = self.pretrained_cfg
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def checkpoint_filter_fn(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under our names, of weights under the original implementation's or ours."""
        return dict(weights)

    def adapted_to_input(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a checkpoint's weights (under our names) that depend on the input, where the network has another."""
        name = f"{self.STEMS[0]}.weight"
        weight = weights.get(name)
        if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or self.options.in_chans == 3:
            return {}
        return {name: adapt_input_conv(self.options.in_chans, weight)}

    def original_names(self) -> dict[str, str]:
        """The original implementation's name of every parameter and buffer, by ours."""
        return {name: name for name in self.state_dict()}

    def is_left_out(self, name: str) -> bool:
        """Whether a pyramid has no use for an entry of a whole network's checkpoint, by its name (ours)."""
        return name.startswith(("head.", self.PYRAMID_ONLY))

    def check_image(self, image: Tensor) -> None:
        """Raise UserError for anything but images `[B, in_chans, H, W]`."""
        in_chans = self.options.in_chans
        if image.ndim != 4 or image.shape[1] != in_chans:
            raise UserError(
                f"the model takes images [B, {in_chans}, H, W] (in_chans={in_chans}), "
                f"not a tensor of shape {list(image.shape)}"
            )
