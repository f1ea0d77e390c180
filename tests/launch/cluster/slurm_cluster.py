"""A SLURM cluster of two nodes on this machine, for developers and for the tests of this folder.

    python tests/launch/cluster/slurm_cluster.py start|stop|status [--folder DIR]     (make cluster, make cluster-stop)

Runs Debian's munged, slurmctld and two slurmd, with a munge key of their own and everything they write in one private
folder; a SLURM that is set up on this machine is neither used nor touched. The nodes are called n1 and n2, have eight
cores each on paper, and run jobs as the user who started them: root is not needed. There is no accounting database, so
``sacct`` has nothing to say; ended jobs stay visible to ``scontrol show job`` for an hour.
"""

import argparse
import contextlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}
NODES = ("n1", "n2")
# What sinfo calls a node that takes jobs or has some.
AT_WORK = {"idle", "mix", "alloc", "comp"}
# Daemons live in sbin, which is not on every user's PATH.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# The nodes are near: one that is silent for 20 s is down. A requeued job waits cred_expire, 5 s (usually two minutes).
CONFIGURATION = """\
ClusterName=evmamba
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[slurmctld]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=5
CompleteWait=0
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n1]} CPUs=8 RealMemory=64000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n2]} CPUs=8 RealMemory=64000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


class ClusterError(Exception):
    """The cluster cannot be brought up; the message says why."""


def missing_packages() -> list[str]:
    """Debian's packages that this machine lacks for a cluster."""
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=SEARCH_PATH) is None]


class Cluster:
    """A cluster below one folder; `start` and `stop` may be called in any state and from different processes.

    Args:
        folder: for its files; short, because a socket's path must not be longer than 107 characters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.configuration = self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """This process's environment without a surrounding job's variables, for commands that use the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        return kept | {"SLURM_CONF": str(self.configuration), "PATH": SEARCH_PATH}

    def start(self) -> None:
        """Bring up what does not run yet and return when both nodes take jobs.

        Raises:
            ClusterError: packages are missing, or a daemon ends or does not answer within a minute.
        """
        if missing := missing_packages():
            raise ClusterError(f"this needs SLURM and munge; on Debian and Ubuntu: apt-get install {' '.join(missing)}")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o711)  # munged wants its socket to be reachable
        if not any(self._pids().values()):
            self._configure()
        folder = self.folder
        self._daemon("munged", ["-F", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
                     + [f"--{file}-file={folder}/munged.{file}" for file in ("log", "pid", "seed")])  # fmt: skip
        self._wait("munged", lambda: (folder / "munge.socket").exists())
        self._daemon("slurmctld", ["-D", "-i", "-f", str(self.configuration)])
        for node in NODES:
            self.start_node(node)
        self._wait("slurmctld", lambda: set(self.states().values()) <= AT_WORK)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd unless it runs."""
        self._daemon(node, ["-D", "-f", str(self.configuration), "-N", node], program="slurmd")

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd at once, as when the node breaks."""
        pid = self._pids()[node]
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self._wait_ended(pid)

    def stop(self) -> None:
        """Cancel all jobs and end all daemons of this folder. Files stay, for reading the logs."""
        pids = self._pids()
        if pids.get("slurmctld") is not None:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--full", f"--user={_user()}")
                deadline = time.monotonic() + 15
                while self.run("squeue", "--noheader") and time.monotonic() < deadline:
                    time.sleep(0.2)
        for name in (*NODES, "slurmctld", "munged"):
            if (pid := pids.get(name)) is not None:
                os.kill(pid, signal.SIGTERM)
                self._wait_ended(pid)

    def states(self) -> dict[str, str]:
        """State of every node by name, e.g. ``{"n1": "idle", "n2": "down"}``; "unknown" while nobody answers."""
        try:
            words = self.run("sinfo", "--Node", "--noheader", "--format=%N %t").split()
        except subprocess.SubprocessError:
            return dict.fromkeys(NODES, "unknown")
        return dict(zip(words[::2], words[1::2], strict=True))

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run one of SLURM's commands and return what it prints.

        Raises:
            subprocess.SubprocessError: it fails or does not end.
        """
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, check=True, timeout=timeout
        )
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows about a job: JobState, Restarts, NodeList, StdOut, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, reached: Callable[[dict[str, str]], bool], seconds: float) -> dict[str, str]:
        """Return the job as soon as it is as wanted.

        Raises:
            ClusterError: it is not within so many seconds; the message holds its state and the end of its log.
        """
        deadline = time.monotonic() + seconds
        while not reached(job := self.job(number)):
            if time.monotonic() > deadline:
                log = Path(job["StdOut"])
                said = log.read_text()[-3000:] if log.exists() else "(no log)"
                raise ClusterError(f"job {number} is {job['JobState']} ({job['Reason']}) after {seconds} s:\n{said}")
            time.sleep(0.3)
        return job

    def _configure(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(folder=self.folder, host=host, user=_user(), ports=_free_ports())
        self.configuration.write_text(text)
        # Since 23.11 slurmd wants to know that it shall leave control groups alone; older ones do not know the word.
        version = re.search(r"(\d+)\.(\d+)", self._output("slurmd", "-V"))
        if version and (int(version[1]), int(version[2])) >= (23, 11):
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _output(self, program: str, *arguments: str) -> str:
        path = shutil.which(program, path=SEARCH_PATH)
        return subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=30).stdout

    def _daemon(self, name: str, arguments: Sequence[str], program: str | None = None) -> None:
        if self._pids().get(name) is not None:
            return
        path = shutil.which(program or name, path=SEARCH_PATH)
        assert path is not None
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                cwd=self.folder,
                start_new_session=True,
            )
        record = self.folder / "pids.json"
        started = json.loads(record.read_text()) if record.exists() else {}
        record.write_text(json.dumps(started | {name: [process.pid, _start_time(process.pid)]}))

    def _pids(self) -> dict[str, int | None]:
        """Process of each daemon that runs; a number that is another process's by now counts as None."""
        record = self.folder / "pids.json"
        started = json.loads(record.read_text()) if record.exists() else {}
        return {name: pid if _start_time(pid) == then else None for name, (pid, then) in started.items()}

    def _wait(self, name: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [daemon for daemon, pid in self._pids().items() if pid is None]
            if ended or time.monotonic() > deadline:
                log = self.folder / f"{ended[0] if ended else name}.log"
                reason = f"{ended[0]} ended" if ended else f"{name} was not ready within {seconds:.0f} s"
                last = "\n".join(log.read_text().splitlines()[-5:])
                self.stop()
                raise ClusterError(f"{reason}; {log} ends with:\n{last}")
            time.sleep(0.2)

    def _wait_ended(self, pid: int, seconds: float = 10) -> None:
        """Wait for a daemon to end; it is killed if it does not."""
        deadline = time.monotonic() + seconds
        while pid in self._pids().values():
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


def _free_ports() -> dict[str, int]:
    """A port for every daemon; not the usual ones, for there may be other clusters on this machine."""
    with contextlib.ExitStack() as taken:
        probes = {name: taken.enter_context(socket.socket()) for name in ("slurmctld", *NODES)}
        for probe in probes.values():
            probe.bind(("", 0))
        return {name: probe.getsockname()[1] for name, probe in probes.items()}


def _start_time(pid: int) -> int | None:
    """When a process began, in ticks, which tells it from a later one of the same number; None if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] == "Z" else int(words[19])


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def main() -> int:
    parser = argparse.ArgumentParser(description="A SLURM cluster of two nodes on this machine.")
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("--folder", type=Path, default=Path(f"/tmp/evmamba-cluster-{os.geteuid()}"), metavar="DIR")
    given = parser.parse_args()
    cluster = Cluster(given.folder)
    if given.action == "start":
        try:
            cluster.start()
        except ClusterError as error:
            print(error, file=sys.stderr)
            return 1
    elif given.action == "stop":
        cluster.stop()
        return 0
    for name, state in cluster.states().items():
        print(f"{name} {state}")
    print(f"\nexport SLURM_CONF={cluster.configuration}     # then sinfo, sbatch, srun, squeue as on any cluster")
    print("export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo     # the nodes' names lead nowhere, unlike real ones'")
    print(f"logs: {cluster.folder}/*.log; make cluster-stop ends it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
