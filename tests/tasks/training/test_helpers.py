"""How the processes that help this one end."""

import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

from evmamba.tasks.training.helpers import end_helpers

HelperMaker = Callable[[str], tuple[BaseProcess, Connection]]


def help_until_told(on_sigterm: str, words: Connection) -> None:
    if on_sigterm == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif on_sigterm == "say so":
        signal.signal(signal.SIGTERM, lambda number, frame: (words.send("told"), exit(0)))
    words.send("ready")
    time.sleep(600)


@pytest.fixture
def make_helper() -> Iterator[HelperMaker]:
    made: list[BaseProcess] = []

    def make(on_sigterm: str) -> tuple[BaseProcess, Connection]:
        ours, theirs = multiprocessing.Pipe()
        helper = multiprocessing.get_context("fork").Process(
            target=help_until_told, args=(on_sigterm, theirs), daemon=True
        )
        helper.start()
        made.append(helper)
        assert ours.poll(60)
        assert ours.recv() == "ready"
        return helper, ours

    yield make
    for helper in made:
        helper.kill()
        helper.join()


def test_one_that_ignores_sigterm_is_killed(make_helper: HelperMaker):
    helper, _ = make_helper("ignore")
    end_helpers([helper])
    assert helper.exitcode == -signal.SIGKILL


def test_one_that_obeys_has_its_time_to_end_by_itself(make_helper: HelperMaker):
    helper, words = make_helper("say so")
    end_helpers([helper], patience=60)
    assert words.recv() == "told"
    assert helper.exitcode == 0


def test_patience_is_for_all_of_them_together(make_helper: HelperMaker):
    helpers = [make_helper("ignore")[0] for _ in range(3)]
    begin = time.monotonic()
    end_helpers(helpers, patience=3)
    assert time.monotonic() - begin < 8
    assert [helper.exitcode for helper in helpers] == [-signal.SIGKILL] * 3


def test_who_is_told_of_the_deaths_of_others_is_not_told_of_these(make_helper: HelperMaker):
    """As torch, whose answer to a loading process's death is an error."""
    helper, _ = make_helper("ignore")
    told: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: told.append(number))
    try:
        end_helpers([helper])
        assert told == []
        other, _ = make_helper("ignore")
        other.kill()
        other.join()
        assert told == [signal.SIGCHLD]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_another_thread_ends_nothing_and_has_no_error(make_helper: HelperMaker):
    """Handlers of signals are the main thread's."""
    helper, _ = make_helper("ignore")
    ends: list[str] = []

    def end() -> None:
        end_helpers([helper])
        ends.append("no error")

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert ends == ["no error"]
    assert helper.is_alive()


def test_the_rest_is_killed_and_handlers_come_back_when_waiting_is_interrupted(make_helper: HelperMaker):
    helpers = [make_helper("ignore")[0] for _ in range(2)]
    before = signal.getsignal(signal.SIGCHLD)
    told = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            end_helpers(helpers, patience=60)
    finally:
        signal.signal(signal.SIGALRM, told)
    assert [helper.exitcode for helper in helpers] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGCHLD) == before


# What a script of one's own may have open when it ends: a daemon that ignores SIGTERM, and a pool.
SCRIPT = """
import multiprocessing, signal, sys, time

def ignore():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)

def work():
    from evmamba.tasks.training.helpers import end_loaders_at_exit
    end_loaders_at_exit()
    end_loaders_at_exit()
    context.Process(target=ignore, daemon=True).start()
    ready.wait()

context = multiprocessing.get_context("fork")
ready = context.Event()
"""


@pytest.mark.parametrize(
    ("rest", "code"),
    [
        ("work()", 0),
        ("work(); sys.exit(3)", 3),
        ("work(); raise RuntimeError", 1),
        ("work(); pool = context.Pool(2); pool.map(abs, [-1])", 0),
        ("work(); pool = context.Pool(2)", 0),
        # A process that `multiprocessing` starts, as torch's spawning launchers do, one after the other as well.
        ("child = context.Process(target=work); child.start(); child.join(); sys.exit(child.exitcode)", 0),
        (
            "from evmamba.tasks.training.helpers import end_loaders_at_exit; end_loaders_at_exit()\n"
            "child = context.Process(target=work); child.start(); child.join(); sys.exit(child.exitcode)",
            0,
        ),
    ],
)
def test_a_process_ends_whatever_is_open(rest: str, code: int):
    """Without, each of them waits for its daemon for ever."""
    done = subprocess.run([sys.executable, "-c", SCRIPT + rest], timeout=120, check=False, stderr=subprocess.DEVNULL)
    assert done.returncode == code
