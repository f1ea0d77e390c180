"""Launches that are noted and not run: what the Triton backend would do with tensors of any device, fake ones too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

# Name of the kernel, and the tensors it reads or writes.
Note = Callable[[str, list[Tensor]], None]

_active = False


@contextmanager
def dry_run(note: Note) -> Iterator[None]:
    """Within this context every operator takes the Triton backend, and each launch is told to `note` (in all threads).

    For tensors without memory (`FakeTensorMode`, "meta"): what a kernel would have written is not there. Raises
    ImportError without Triton.
    """
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, **options: Any) -> None:
        arguments = (*args, *options.values())
        note(self.__name__, [value for value in arguments if isinstance(value, Tensor)])

    global _active
    before, _active = _active, True
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield
    finally:
        _active = before


def is_dry_run() -> bool:
    """Whether a `dry_run` is active."""
    return _active
