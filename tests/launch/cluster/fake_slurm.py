"""A SLURM of shell scripts: it records what it is told and knows of jobs what a test sets."""

import os
import shlex
from pathlib import Path

import pytest

# Every command notes its arguments, one call a line, and a copy of a submitted script.
SBATCH = """
n=$(cat "$here/next" 2>/dev/null || echo 100)
if [ -f "$here/refuse" ] && [ "$n" -ge "$(cat "$here/refuse")" ]; then
  echo "sbatch: error: invalid partition specified: gpu" >&2
  exit 1
fi
echo $((n + 1)) > "$here/next"
for script; do case $script in --*) ;; *) break ;; esac; done
cp "$script" "$here/script-$n"
tasks=$(sed -n 's/^#SBATCH --array=\\([0-9,]*\\).*/\\1/p' "$script" | tr , ' ')
for task in ${tasks:-none}; do
  echo "JobState=PENDING Reason=None NodeList= RunTime=00:00:00 TimeLimit=10:00 ExitCode=0:0 Restarts=0" \\
    > "$here/job-$n$([ "$task" = none ] || echo "_$task")"
done
echo "$n;cluster"
"""
SQUEUE = 'for f in "$here"/job-*; do [ -f "$f" ] && echo "${f##*-}"; done; true'
SCONTROL = 'for last; do :; done; echo "JobId=$last $(cat "$here/job-$last")"'
SCANCEL = 'for n; do rm -f "$here/job-$n"; done'
SACCT = 'cat "$here/accounting" 2>/dev/null || { echo "Slurm accounting storage is disabled" >&2; exit 1; }'


class FakeSlurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        scripts = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": SCONTROL, "scancel": SCANCEL, "sacct": SACCT}
        for name, script in scripts.items():
            path = folder / "bin" / name
            note = f'printf "%s " {name} "$@" >> "$here/calls"; echo >> "$here/calls"'
            path.write_text(f"#!/bin/sh\nhere={shlex.quote(str(folder))}\n{note}\n{script}\n")
            path.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        """Arguments of a command's calls, in order."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{command} ").strip() for line in lines if line.startswith(f"{command} ")]

    def set(self, job: int | str, **fields: str) -> None:
        """What scontrol says about a job, e.g. ``JobState="RUNNING"``."""
        (self.folder / f"job-{job}").write_text(" ".join(f"{key}={value}" for key, value in fields.items()))

    def forget(self, job: int | str) -> None:
        (self.folder / f"job-{job}").unlink(missing_ok=True)

    def account(self, *lines: str) -> None:
        """What sacct says."""
        (self.folder / "accounting").write_text("".join(f"{line}\n" for line in lines))

    def refuse_from(self, job: int) -> None:
        """Let sbatch fail from this job number on."""
        (self.folder / "refuse").write_text(str(job))

    def script(self, job: int) -> str:
        return (self.folder / f"script-{job}").read_text()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return slurm
