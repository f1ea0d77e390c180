"""Breaks the Triton kernels on purpose, one change at a time (mutants.toml), and sees that the named test fails.

    make mutants                     all of them
    make mutants ARGS="prefetch dW"  those whose name has one of these words

A change is made in a copy of the project and killed if its test fails there; all these tests have to pass on the
unchanged copy. Ends with an error if a mutant survives, or no longer applies to exactly one place. Tests run in forks
of a process that has imported PyTorch and Triton, which takes longer than most of them.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = 1  # pytest's exit code for tests that fail; 0 where all pass, others where none ran


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file` of kernels/; `test` has to fail."""

    name: str
    file: str
    old: str
    new: str
    test: str

    @property
    def interpreted(self) -> bool:
        """Whether the test runs in Triton's interpreter, which is chosen before triton is imported."""
        return "from .triton_runs import" in (ROOT / self.test.split("::")[0]).read_text()


def chosen(words: Sequence[str]) -> list[Mutant]:
    """The mutants whose name has one of the words; all without words."""
    mutants = [Mutant(**values) for values in tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["mutant"]]
    return [mutant for mutant in mutants if not words or any(word in mutant.name for word in words)]


def stale(mutants: Sequence[Mutant]) -> list[str]:
    """Names of mutants whose old text is not there exactly once, or is there unchanged."""
    return [m.name for m in mutants if (ROOT / "kernels" / m.file).read_text().count(m.old) != 1 or m.old == m.new]


def main() -> int:
    """The command line: 0 if every chosen mutant was killed."""
    parser = argparse.ArgumentParser(description="Break the kernels and see that the tests fail.")
    parser.add_argument("words", nargs="*", help="only mutants whose name has one of these")
    parser.add_argument("--kind", choices=["interpreted", "compiled"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    mutants = chosen(options.words)
    if not mutants:
        parser.error("no mutant's name has one of these words")
    if options.kind:
        return kill([m for m in mutants if m.interpreted == (options.kind == "interpreted")])
    if names := stale(mutants):
        print("these do not apply to exactly one place: " + "; ".join(names))
        return 1
    codes = []
    for kind in ("interpreted", "compiled"):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if kind == "interpreted" else {}
        command = [sys.executable, __file__, "--kind", kind, *options.words]
        codes.append(subprocess.run(command, env=environment, check=False).returncode)
    return int(any(codes))


def kill(mutants: Sequence[Mutant]) -> int:
    """Run the tests of mutants of one kind; 0 if all were killed."""
    for name in ("torch", "triton", "pytest"):
        importlib.import_module(name)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        site = copy_project(Path(folder))
        for test in sorted({m.test for m in mutants}):
            if outcome(site, test):
                print(f"fails on the unchanged kernels, so it cannot tell anything: {test}", flush=True)
                return 1
        for mutant in mutants:
            path = site / "evmamba" / "kernels" / mutant.file
            original = path.read_text()
            start = time.monotonic()
            path.write_text(original.replace(mutant.old, mutant.new))
            code = outcome(site, mutant.test)
            path.write_text(original)
            if code != FAILED:
                survivors.append(mutant.name)
            word = "killed" if code == FAILED else "SURVIVED"
            print(f"{word} in {time.monotonic() - start:.0f} s: {mutant.name}", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed")
    return int(bool(survivors))


def copy_project(folder: Path) -> Path:
    """Backbone, kernels and the kernels' tests, laid out as they are installed."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "evmamba", folder / "evmamba", ignore=without)
    shutil.copytree(ROOT / "kernels", folder / "evmamba" / "kernels", ignore=without)
    for part in ("kernels", "emulator"):
        shutil.copytree(ROOT / "tests" / part, folder / "tests" / part, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def outcome(site: Path, test: str) -> int:
    """Pytest's exit code of a test in a fork of this process, whose working directory is the copy."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(site)
            sys.path.insert(0, str(site))
            with (site / "pytest.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                arguments = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", test]
                code = importlib.import_module("pytest").main(arguments)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, FAILED):
        raise RuntimeError(f"{test} did not run:\n{(site / 'pytest.log').read_text()[-3000:]}")
    return code


if __name__ == "__main__":
    sys.exit(main())
