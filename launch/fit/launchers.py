"""Who started this process, how many others there are, and how they find each other.

A training is started in one of four ways; each process then runs the same program, ``launch/train.py`` in the end:

=============  ==================================  =======================  ==========================================
started by     processes                           rank                     rank 0 listens at
=============  ==================================  =======================  ==========================================
``evmamba``,   ``trainer.devices`` on this         ``LOCAL_RANK``           127.0.0.1, a free port
``python``     machine, started by Lightning
``srun``       tasks of the step: ``--nodes``,     ``SLURM_PROCID``         the step's first node, a port made of
               ``--ntasks-per-node``                                        the numbers of job and step
``torchrun``   ``--nnodes``, ``--nproc-per-node``  ``RANK``                 ``--master-addr``, ``--master-port``
``fabric run`` ``--num-nodes``, ``--devices``      ``RANK``                 ``--main-address``, ``--main-port``
=============  ==================================  =======================  ==========================================

Rank 0's address and port reach torch as ``MASTER_ADDR`` and ``MASTER_PORT``. Set before ``evmamba`` or ``srun``, these
variables win; torchrun sets them itself. The processes then connect to each other through the interface named by
``GLOO_SOCKET_IFNAME`` (CPU) or ``NCCL_SOCKET_IFNAME`` (GPU); where they are unset, gloo takes the interface of the
machine's own name and NCCL the first that is not loopback.

Whoever started the processes decides how many there are: `set_topology` takes ``trainer.devices`` and
``trainer.num_nodes`` from there, so that one recipe serves all four ways, and refuses values that contradict it.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evmamba.errors import UserError
from evmamba.tasks.training import slurm_job


@dataclass(frozen=True)
class Launch:
    """Processes that were started together.

    Attributes:
        by: the program that started them.
        nodes: number of machines.
        per_node: processes on each.
        options: how `by` calls the two numbers, for messages.
    """

    by: str
    nodes: int
    per_node: int
    options: tuple[str, str]


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process among all, 0 for one that is alone; known before the processes have met."""
    # torchrun may run inside a SLURM step, so its variable comes first.
    ranks = (environment.get("RANK"), slurm_job.rank(environment), environment.get("LOCAL_RANK"))
    return next((int(rank) for rank in ranks if rank), 0)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine as the scheduler calls it, else as it calls itself."""
    return slurm_job.node(environment) or socket.gethostname()


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What started this process besides a shell; None if Lightning is to start the others.

    Raises:
        UserError: a job on several nodes whose command was started once, without srun; srun in an interactive job;
            unequal numbers of processes on the nodes.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        per_node, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        if "LT_CLI_USED" in environment:
            return Launch("fabric run", world // per_node, per_node, ("--num-nodes", "--devices"))
        return Launch("torchrun", world // per_node, per_node, ("--nnodes", "--nproc-per-node"))
    step = slurm_job.step(environment)
    return Launch("srun", step.nodes, step.per_node, ("--nodes", "--ntasks-per-node")) if step else None


def set_topology(trainer: Any) -> None:
    """Make a Trainer's options agree with the processes that were started, and the environment with Lightning.

    Args:
        trainer: namespace of the Trainer's options; ``devices``, ``num_nodes``, and under ``fabric run`` also
            ``accelerator``, ``strategy`` and ``precision``, are replaced where they were left open.

    Raises:
        UserError: the options contradict what was started, or rank 0's node cannot be found.
    """
    launch = find_launch()
    if launch is None:
        slurm_job.describe_to_lightning(None)
        return
    if launch.by == "fabric run":
        _take_fabric_options(trainer)
    for name, started, option in zip(
        ("num_nodes", "devices"), (launch.nodes, launch.per_node), launch.options, strict=True
    ):
        asked = _number(getattr(trainer, name))
        open_values = (None, 1) if name == "num_nodes" else (None,)  # 1 is Lightning's default
        if asked not in open_values and asked != started:
            raise UserError(
                f"trainer.{name}={asked}, but {launch.by} started this with {option}={started}; make them equal or "
                f"leave trainer.{name} out"
            )
        if asked != started:
            setattr(trainer, name, started)
    if launch.by == "srun" and (step := slurm_job.step()):
        slurm_job.describe_to_lightning(step)
        _set_address(step)


def _set_address(step: slurm_job.Step) -> None:
    """Set MASTER_ADDR and MASTER_PORT unless they are set, and see that the first leads somewhere."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    given = os.environ.get("MASTER_ADDR")
    address = given or SLURMEnvironment.resolve_root_node_address(step.hosts)
    if step.nodes > 1:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            whose = "the environment" if given else "the step's first node"
            raise UserError(
                f"MASTER_ADDR={address} ({whose}) has no address here ({error.strerror}); export MASTER_ADDR with one "
                "that all nodes reach"
            ) from None
    os.environ["MASTER_ADDR"] = address
    os.environ.setdefault("MASTER_PORT", str(slurm_job.port()))


def _take_fabric_options(trainer: Any) -> None:
    """``fabric run`` hands its options on in variables that only Lightning's Fabric reads, not its Trainer."""
    for name, open_value in (("accelerator", "auto"), ("strategy", "auto"), ("precision", None)):
        wanted = os.environ.get(f"LT_{name.upper()}")
        have = getattr(trainer, name)
        if wanted is None or have == wanted:
            continue
        if have not in (open_value, None):
            raise UserError(
                f"fabric run --{name}={wanted}, but trainer.{name}={have}; make them equal or leave one out"
            )
        setattr(trainer, name, wanted)


def _number(value: Any) -> int | None:
    """How many devices or nodes a Trainer's option asks for; None where it leaves that open ("auto", -1)."""
    if isinstance(value, list):
        return len(value)
    text = str(value)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() else None
