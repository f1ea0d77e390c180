"""Signs of life of every process of a run, and the end of a training in which one has fallen silent.

Each process has a small file, ``heartbeats/rank-N.json``, written by a thread every few seconds: how far its training
is, and where its main thread stands. A process that is stopped, or whose machine is gone, writes no more; one that
hangs still writes, but comes no further. The others wait for it in a collective operation, from which nothing can wake
them, so it is this thread that notices, says which process it is, and ends the job.
"""

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from evmamba.errors import UserError, first_few, printable
from evmamba.files import write_text
from evmamba.tasks.plain_files import read_json

FOLDER = "heartbeats"
HANG_FILE = "hang.json"
EVERY_SECONDS = 5.0
TIMEOUT_SECONDS = 120.0
# Before the first step and in an evaluation one process may work for long while the others wait: so many time-outs.
PATIENCE = 10
ENDED = "ended"
STEP_PHASES = ("loading", "forward", "backward", "optimizer step")


@dataclass(frozen=True)
class Beat:
    """What a process says of itself.

    Attributes:
        token: of the start that it belongs to, see `evmamba.tasks.training.lease`.
        rank, host, machine, pid: who it is.
        count: of the beats so far.
        batch: training batches that it has begun in this start.
        phase: what it does with this one, or besides.
        order: how many phases it has been through, which are the same for all processes.
        part: batches within the phase, in an evaluation, where processes have different numbers of them.
        idle: how long before this beat it last came further [s].
        where: the line at which its main thread stands.
    """

    token: str
    rank: int
    host: str
    machine: str
    pid: int
    count: int = 0
    batch: int = 0
    phase: str = "starting"
    order: int = 0
    part: int = 0
    idle: float = 0.0
    where: str = ""

    @property
    def position(self) -> tuple[int, int]:
        """Grows as the process comes further, and is the same for all at the same place."""
        return self.order, self.part

    def __str__(self) -> str:
        return f"rank {self.rank} on {printable(self.host)}"


class Heartbeat:
    """This process's beats, and its watch over the others while it waits for them.

    Args:
        folder: the run's.
        token, rank, host, machine: see `Beat`.
        is_ours: tells whether the folder still belongs to this start; once it does not, no beat is written there.

    Attributes:
        rank: see `Beat`.
        timeout: seconds without progress, from the first step on, after which the job is ended; None: never.
    """

    def __init__(
        self,
        folder: Path,
        token: str,
        rank: int,
        host: str,
        machine: str,
        is_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self._is_ours = is_ours
        self.rank = rank
        self.timeout: float | None = None
        self._beat = Beat(token, rank, host, machine, os.getpid())
        self._moved = time.monotonic()
        self.before_end: Callable[[], None] = lambda: None  # what else is to be written ahead of it
        self.requeue: Callable[[], bool] = lambda: False  # asks for another start, and says whether there will be one
        self._count = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._main = threading.main_thread().ident

    def start(self) -> None:
        self._write()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10)
        self.note(ENDED)
        if self._is_ours():
            self._write()  # whoever is still at work must not take this process for one that has stopped

    def note(self, phase: str, batch: int = 0, part: int = 0) -> None:
        """Come further: to a new phase, or with `part` within one. The thread writes it down."""
        order = self._beat.order + (part == 0)
        self._beat, self._moved = (
            replace(self._beat, phase=phase, batch=batch, order=order, part=part),
            time.monotonic(),
        )

    @property
    def _in_step(self) -> bool:
        """Whether the first step is done and this is a later one."""
        return self._beat.batch > 1 and self._beat.phase in STEP_PHASES

    def _now(self) -> Beat:
        idle = round(time.monotonic() - self._moved, 1)
        return replace(self._beat, count=self._count, idle=idle, where=_where(self._main))

    def _write(self) -> None:
        told = asdict(self._now())
        self._count += 1
        with contextlib.suppress(UserError):  # a full disk, a folder moved away: no sign of life is sign enough
            write_text(beat_file(self.folder, self.rank), json.dumps(told), durable=False)

    def _run(self) -> None:
        silent = 0.0  # seconds in which this thread ran and the training came no further
        then, position = time.monotonic(), None
        seen: dict[int, int] | None = None
        while not self._ended.wait(self._pause()) and self._is_ours():
            self._write()
            now = time.monotonic()
            passed, then = min(now - then, 2 * self._pause()), now  # a process that was stopped has not waited
            if self.timeout is None or position != self._beat.position:
                silent, seen, position = 0.0, None, self._beat.position
                continue
            silent += passed
            if silent >= self.timeout / 2 and seen is None:
                seen = {rank: beat.count for rank, beat in beats(self.folder, self._beat.token).items()}
            if silent >= self.timeout and seen is not None:
                found = beats(self.folder, self._beat.token) | {self.rank: self._now()}
                others = [beat for beat in found.values() if beat.rank != self.rank and beat.phase != ENDED]
                stopped = [beat for beat in others if seen.get(beat.rank) == beat.count]
                if stopped or silent >= self.timeout * (1 if self._in_step else PATIENCE):
                    self._end(silent, found, stopped)

    def _pause(self) -> float:
        return min(EVERY_SECONDS, (self.timeout or 1e9) / 10)

    def _end(self, silent: float, found: dict[int, Beat], stopped: list[Beat]) -> None:
        """Say which process is at fault, have the job queued again, and end this process and those that hang on it."""
        suspects = stopped or behind(found)
        message = describe(suspects, bool(stopped), found, silent)
        first = self._is_first(message)
        try:
            if first:
                print(f"evmamba: {message}", file=sys.stderr, flush=True)
            with beat_file(self.folder, self.rank).with_suffix(".stack").open("w") as file:
                faulthandler.dump_traceback(file)
            self.before_end()
            if first:
                then = "the job is queued again" if self.requeue() else "the same command continues"
                print(f"evmamba: the training ends here; {then}", file=sys.stderr, flush=True)
            else:
                time.sleep(2)  # as soon as one process has left, its launcher ends the others
        except Exception:
            traceback.print_exc()  # and end all the same
        for beat in suspects:
            if beat.machine == self._beat.machine and beat.rank != self.rank:
                _kill(beat.pid)  # who is stopped hears nothing else
        _kill_children()
        os._exit(os.EX_TEMPFAIL)  # as whoever is stopped by a signal: the same command continues

    def _is_first(self, message: str) -> bool:
        file = self.folder / FOLDER / HANG_FILE
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(file.read_text())
            if not isinstance(told, dict) or told.get("token") != self._beat.token:
                file.unlink()  # of an earlier start
        try:
            with file.open("x") as stream:
                json.dump({"token": self._beat.token, "reason": message}, stream)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True


def beat_file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank-{rank}.json"


def beats(folder: Path, token: str | None = None) -> dict[int, Beat]:
    """The last beat of every process of a run by its rank; only of one start, if its token is given."""
    found = {}
    for path in (folder / FOLDER).glob("rank-*.json"):
        with contextlib.suppress(UserError, msgspec.ValidationError):  # half written, or of another version
            beat = msgspec.convert(read_json(path), Beat)
            if token in (None, beat.token):
                found[beat.rank] = beat
    return dict(sorted(found.items()))


def behind(found: Mapping[int, Beat]) -> list[Beat]:
    """The processes that have ended, else those that are less far than others; none where all stand at one place."""
    if ended := [beat for beat in found.values() if beat.phase == ENDED]:
        return ended
    last = min(beat.position for beat in found.values())
    late = [beat for beat in found.values() if beat.position == last]
    return late if len(late) < len(found) else []


def describe(suspects: list[Beat], stopped: bool, found: Mapping[int, Beat], silent: float) -> str:
    """One line: who is silent, and what the others wait in.

    Args:
        suspects: the processes at fault, if that can be told.
        stopped: they gave no sign of life, rather than came no further.
        found: all beats.
        silent: seconds without progress.
    """
    who = first_few(suspects, 3)
    others = [beat for beat in found.values() if beat not in suspects]
    wait = f"; {others[0]} waits in batch {others[0].batch}, {others[0].phase} ({others[0].where})" if others else ""
    if stopped:
        return f"{who} gives no sign of life for {silent:.0f} s (stopped, or its node is lost){wait}"
    if suspects:
        at = f"in batch {suspects[0].batch}, {suspects[0].phase} ({suspects[0].where})"
        return f"no progress for {silent:.0f} s because of {who} {at}{wait}"
    return f"no progress for {silent:.0f} s, and all processes stand at the same place{wait}"


def silence(folder: Path, seconds: float = TIMEOUT_SECONDS) -> str | None:
    """What to say of a run that is at work but has come no further for so long, e.g. "silent for 12 min, rank 1 on n2".

    None for one that comes on, or has no heartbeats. No clock of another machine is asked, but that of the folder's
    file system for how long ago a beat was written.
    """
    found = beats(folder)
    if not found:
        return None
    now = time.time()
    ages = {rank: max(0.0, now - beat_file(folder, rank).stat().st_mtime) for rank in found}
    token = found[min(ages, key=lambda rank: ages[rank])].token
    found = {rank: beat for rank, beat in found.items() if beat.token == token}
    silent = min(ages[rank] + beat.idle for rank, beat in found.items())
    if silent < seconds:
        return None
    stopped = [beat for rank, beat in found.items() if ages[rank] > max(seconds, 10 * EVERY_SECONDS)]
    who = stopped if 0 < len(stopped) < len(found) else behind(found)
    named = f", {', '.join(map(str, who))}" if who else ""
    return f"silent for {silent / 60:.0f} min{named}"


def _where(main: int | None) -> str:
    frame = sys._current_frames().get(main) if main is not None else None
    if frame is None:
        return ""
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
