"""Choosing a device by name."""

from evmamba.errors import UserError, unknown_name

DEVICES = ("auto", "cpu", "cuda")


def choose_device(wanted: str) -> str:
    """``"cpu"`` or ``"cuda"``; "auto" takes CUDA where it is there.

    Raises:
        UserError: another name, or CUDA asked for where there is none.
    """
    import torch  # not needed for the names

    if wanted not in DEVICES:
        raise unknown_name("device", wanted, DEVICES)
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"
