"""Train and evaluate with several strategies in two CPU processes; test_strategies_training.py starts it.

    python sharded_run.py JOBS.json

Lightning starts the second process. JOBS.json is a list of ``{"name": ..., "folder": ..., "options": [LightningCLI's],
"fit": true, "checkpoint": null or a path}``; one after the other is trained and tested, or only tested. A job leaves in
its folder ``told<rank>.json`` (loss and learning rate of every step, metrics, parameters) and, if it trained,
``weights<rank>.pt`` with the whole state_dict.
"""

import faulthandler
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from evmamba.launch.fit import strategies
from evmamba.launch.fit.cli import EvmambaCLI
from evmamba.launch.fit.quiet import quiet_logs, quiet_warnings


class CpuZeRO(strategies.ZeRO):
    """Without Lightning's two checks that there are GPUs; DeepSpeed itself trains on a CPU (DS_ACCELERATOR=cpu)."""

    on_cpu = True

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        # Otherwise it compiles an operator for this kind of processes, for half a minute; gloo is enough.
        backend: Any = importlib.import_module("deepspeed.comm.torch")  # as an attribute that is PyTorch itself
        backend.build_shm_op = lambda: None
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


class Steps(L.Callback):
    """This process's loss and learning rate of every training step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def run(job: dict[str, Any]) -> None:
    cli = EvmambaCLI([*job["options"], f"--trainer.default_root_dir={job['folder']}"], run=False)
    trainer, steps, folder = cli.trainer, Steps(), Path(job["folder"])
    trainer.callbacks.append(steps)  # type: ignore[attr-defined]
    told: dict[str, Any] = {}
    checkpoint = job["checkpoint"]
    if job["fit"]:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
        told["val"] = dict(cli.model.evaluation.metrics)
        with strategies.whole_parameters(trainer):
            told["parameters"] = sum(parameter.numel() for parameter in cli.model.parameters())
            torch.save(cli.model.state_dict(), folder / f"weights{trainer.global_rank}.pt")
        checkpoint = None
    trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False)
    told |= {"losses": steps.losses, "rates": steps.rates, "test": dict(cli.model.evaluation.metrics)}
    folder.mkdir(exist_ok=True)
    (folder / f"told{trainer.global_rank}.json").write_text(json.dumps(told))


def main(jobs: list[dict[str, Any]]) -> None:
    faulthandler.dump_traceback_later(500, exit=True)  # two processes that wait for each other: say where
    torch.set_num_threads(1)
    quiet_warnings()
    quiet_logs()
    strategies.ZeRO = CpuZeRO  # type: ignore[misc]
    for job in jobs:
        run(job)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
