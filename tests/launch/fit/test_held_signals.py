"""A signal that comes while a process starts is obeyed, and later."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, time
from evmamba.launch.fit.held_signals import deliver_signals, hold_signals
hold_signals()
print("started", flush=True)
time.sleep(0.3)
signal.signal(getattr(signal, "{name}"), lambda number, frame: print("obeyed", flush=True))
deliver_signals()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_waits_for_its_handler(name: str):
    command = [sys.executable, "-c", PROGRAM.format(name=name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(getattr(signal, name))
        assert process.stdout.read() == "obeyed\n"
    assert process.returncode == 0
