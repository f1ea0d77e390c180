"""The precisions of trainings and measurements, by Lightning's names. No torch: a table is made without it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from evmamba.errors import UserError

if TYPE_CHECKING:
    import torch

DEFAULT = "32-true"


@dataclass(frozen=True)
class Precision:
    """What one of Lightning's names means.

    Attributes:
        short: Lightning's other name for it.
        dtype: what layers compute in, by torch's name.
        mixed: whether by autocast; parameters are then float32.
    """

    short: str
    dtype: str
    mixed: bool

    @property
    def words(self) -> str:
        """For people, e.g. ``"mixed bfloat16"``."""
        return f"mixed {self.dtype}" if self.mixed else self.dtype


PRECISIONS = {
    "32-true": Precision("32", "float32", mixed=False),
    "bf16-mixed": Precision("bf16", "bfloat16", mixed=True),
    "16-mixed": Precision("16", "float16", mixed=True),
    "64-true": Precision("64", "float64", mixed=False),
}
# What is measured, by the dtype: networks with float32 parameters.
MEASURED = {kind.dtype: name for name, kind in PRECISIONS.items() if kind.mixed or kind.dtype == "float32"}


def full_name(name: str | int | None) -> str:
    """Lightning's long name of a precision; what it is not known for stays as it is. None: `DEFAULT`."""
    short = {kind.short: full for full, kind in PRECISIONS.items()}
    return short.get(str(name), str(name)) if name is not None else DEFAULT


def in_words(name: str) -> str:
    """For people: float32, mixed bfloat16 ...; an unknown name as it is."""
    return PRECISIONS[name].words if name in PRECISIONS else name


def autocast_to(name: str | None) -> "torch.dtype | None":
    """What a forward pass is autocast to where a network is measured in a precision; None: float32, without.

    Raises:
        UserError: nothing is measured in it.
    """
    import torch

    name = name or DEFAULT
    if name not in MEASURED.values():
        raise UserError(f"--precision {name}: a benchmark runs and measures {', '.join(MEASURED.values())}")
    kind = PRECISIONS[name]
    return getattr(torch, kind.dtype) if kind.mixed else None
