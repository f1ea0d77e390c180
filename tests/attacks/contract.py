"""What every reader of a stranger's file keeps: a result, or one line that names the file; nothing run, nothing written
elsewhere, no time or memory out of proportion."""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evmamba.errors import UserError, printable

MEGABYTES = 400
SECONDS = 5.0  # of processor time
ADDRESS_SPACE = 6 * 2**30  # above what is in use: what is promised in gigabytes cannot be had
STARTS_SOMETHING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect"}
CHANGES_FILES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Watch:
    """What a reader did that it must not do.

    Attributes:
        writable: folders in which it may write.
        secret: a file outside of the data that nobody may open.
        done: events in words.
    """

    writable: Sequence[Path]
    secret: Path
    done: list[str] = field(default_factory=list)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS_SOMETHING:
            self.done.append(f"{event}{arguments}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            path = os.fsdecode(arguments[0])
            if flags & WRITING:
                self._written(path)
            elif path == str(self.secret):
                self.done.append(f"read {path}")
        elif event in CHANGES_FILES and isinstance(arguments[0], str | bytes | os.PathLike):
            self._written(os.fsdecode(arguments[0]))

    def _written(self, path: str) -> None:
        allowed = (*map(str, self.writable), "/dev/null", sys.prefix)  # modules' bytecode is below the last
        if not os.path.realpath(path).startswith(allowed) and "__pycache__" not in path:
            self.done.append(f"wrote {path}")


_watch: Watch | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch is not None:
        _watch.see(event, arguments)


sys.addaudithook(_hook)  # it cannot be taken away again, and does nothing while nobody watches


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    global _watch
    _watch = watch
    try:
        yield
    finally:
        _watch = None


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let no more memory be had than is in use and some."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ADDRESS_SPACE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def hold(read: Callable[[], Any], watch: Watch, names: Sequence[str], markers: Sequence[Path] = ()) -> Any:
    """Call a reader and see that it keeps the contract.

    Args:
        read: returns what is in the file; raises AssertionError itself where that is nonsense.
        watch: where it may write.
        names: of the files it reads; a complaint has to have one of them.
        markers: files that hostile content would make.

    Returns:
        What it returned, or its UserError.
    """
    began, most = time.process_time(), _peak_memory(reset=True)
    found: Any
    try:
        with watching(watch), little_memory():
            found = read()
    except UserError as error:
        found = error
        _check_line(str(error), names)
    assert not watch.done, watch.done
    assert not any(marker.exists() for marker in markers), "it ran what the file says"
    assert time.process_time() - began < SECONDS
    used = (_peak_memory() - most) // 2**20
    assert used < MEGABYTES, f"{used} MB"
    return found


def _check_line(said: str, names: Sequence[str]) -> None:
    assert said == " ".join(said.split()), f"not one line: {said!r}"
    assert said == printable(said), f"not printable: {said!r}"
    assert len(said) < 2000, f"too long: {said[:300]} ..."
    assert any(name in said for name in names), f"names none of {list(names)[:5]}: {said}"
    assert "weights_only" not in said, f"advice to run it: {said}"
    assert "Traceback" not in said, said


def _peak_memory(reset: bool = False) -> int:
    """The most memory this process has held since the last reset [bytes]."""
    if reset:
        with contextlib.suppress(OSError):  # not in every container; then memory is held by `little_memory` alone
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM" if not reset else "VmRSS"))
    return int(line.split()[1]) * 1024
