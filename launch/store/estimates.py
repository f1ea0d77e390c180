"""How long a run was expected to take, kept in its folder so that the report can put the truth beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from evmamba.errors import UserError
from evmamba.launch.store.results import write_json
from evmamba.tasks.plain_files import read_json

FILE = "estimate.json"


@dataclass(frozen=True)
class Estimate:
    """Of a training with its validations.

    Attributes:
        seconds: by the clock.
        processes: that share it, one a GPU.
        basis: the figures that it was made of, and which of them are assumed.
    """

    seconds: Annotated[float, msgspec.Meta(gt=0)]
    processes: Annotated[int, msgspec.Meta(gt=0, le=2**63 - 1)]
    basis: str

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.processes / 3600

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, asdict(self))

    def beside(self, seconds: float) -> str:
        """The estimate beside what it took, in words."""
        return (
            f"estimated {hours(self.seconds)}, took {hours(seconds)} ({seconds / self.seconds - 1:+.0%}); {self.basis}"
        )


def read_estimate(folder: Path) -> Estimate | None:
    """What `Estimate.write` left in a run's folder; None if nothing did.

    Raises:
        UserError: another file of that name.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return msgspec.convert(read_json(path), Estimate)
    except (UserError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: no estimate of a run ({error}); remove it") from error


def hours(seconds: float) -> str:
    """``2.5 h``, below an hour ``12 min``."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
