"""A backbone with its head as one network, as the field counts parameters and multiply-accumulates of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class WholeNetwork:
    """A backbone with its head.

    Attributes:
        model: the network; its parameters count.
        counted: takes images ``[1, 3, *size]`` and does the work that counts, whatever the images show.
        inputs: from one image ``[3, *size]`` to the arguments of `model`.
        size: height and width [pixels].
        num_classes: of the head.
        protocol: what else a result says of how it was built.
        also_counted: other countings by name, likewise.
    """

    model: nn.Module
    counted: nn.Module
    inputs: Callable[[Tensor], tuple[Any, ...]]
    size: tuple[int, int]
    num_classes: int
    protocol: Mapping[str, Any] = field(default_factory=dict)
    also_counted: Mapping[str, nn.Module] = field(default_factory=dict)
