"""The command as a module and as a file, which launchers start; trainings by them are in fit/test_launchers.py."""

import subprocess
import sys

import pytest

import evmamba.launch.train


@pytest.mark.parametrize("started", [["-m", "evmamba.launch.train"], [evmamba.launch.train.__file__]])
def test_it_is_the_command(started: list[str]):
    done = subprocess.run([sys.executable, *started, "fitt"], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "evmamba: unknown command 'fitt'; did you mean fit or test?\n"
