"""One run in one process: ``python -m evmamba.launch.run FOLDER/spec.json``.

Fits and tests what the spec names, or measures the cost of a bare backbone, and leaves ``result.json`` beside the spec,
also when it fails. Exit status: 0 finished, 1 failed. While it works, ``progress.json`` says how far it is.
"""

import dataclasses
import datetime
import json
import sys
import traceback
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from evmamba.errors import UserError
from evmamba.launch.quiet import quiet_logs, quiet_warnings
from evmamba.launch.results import Result, config_hash, device_name, provenance, write_json, write_result

SPEC_FILE = "spec.json"


@dataclass
class RunSpec:
    """What decides one run; equal specs give equal results, so the hash of one tells whether it must be run again.

    Attributes:
        task: ``"cost"`` or a task.
        model: name of the backbone.
        head: see `Result.head`.
        recipe: path of the recipe; None for a cost run.
        recipe_hash: hash of the recipe's text, so that an edited recipe is another run.
        arguments: LightningCLI options on top of the recipe.
        seed: of everything.
        device: ``"cpu"`` or ``"cuda"``.
        precision: Lightning's name, e.g. ``"32-true"`` or ``"bf16-mixed"``; None leaves it to the recipe.
        timing: of a cost run: batch_size of the throughput measurement, warmup_steps, timed_steps.
        data_fingerprint: of the data set, so that changed data is another run.
    """

    task: str
    model: str
    head: str | None
    seed: int
    device: str
    precision: str | None
    recipe: str | None = None
    recipe_hash: str | None = None
    arguments: list[str] = dataclasses.field(default_factory=list)
    timing: dict[str, int] = dataclasses.field(default_factory=dict)
    data_fingerprint: str | None = None

    @property
    def hash(self) -> str:
        # Where the recipe lies does not matter, what it says does; so does the version, which newer code may change.
        decides = {k: v for k, v in dataclasses.asdict(self).items() if k != "recipe"}
        return config_hash(decides | {"evmamba": metadata.version("evmamba")})

    @property
    def name(self) -> str:
        parts = [self.task, self.head if self.task == "detection" else None, self.model, self.hash[:6]]
        return "-".join(part for part in parts if part)

    def write(self, folder: Path) -> None:
        write_json(folder / SPEC_FILE, dataclasses.asdict(self))

    @staticmethod
    def read(path: Path) -> "RunSpec":
        return RunSpec(**json.loads(path.read_text(encoding="utf-8")))

    def cli_arguments(self, folder: Path) -> list[str]:
        """LightningCLI's options for this run, with everything it writes under `folder`."""
        return [
            f"--config={self.recipe}",
            f"--seed_everything={self.seed}",
            f"--trainer.accelerator={self.device}",
            "--trainer.devices=1",
            *([f"--trainer.precision={self.precision}"] if self.precision else []),
            f"--trainer.default_root_dir={folder}",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.logger.name=log",
            "--trainer.logger.version=csv",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *self.arguments,
        ]


def failed_result(spec: RunSpec, reason: str, start: datetime.datetime) -> Result:
    """The result of a run that did not get to its end, with the reason as one line."""
    origin = provenance(
        config=dataclasses.asdict(spec),
        seed=spec.seed,
        device=device_name(spec.device),
        precision=spec.precision or "",
        start=start,
    )
    return Result(
        run=spec.name,
        task=spec.task,
        model=spec.model,
        head=spec.head,
        status="failed",
        reason=" ".join(reason.split()),
        provenance=origin | {"spec_hash": spec.hash},
    )


def run(spec: RunSpec, folder: Path) -> None:
    """Run a spec and write its result.

    Raises:
        UserError, or whatever went wrong; no result is written then (`main` does).
    """
    if spec.task == "cost":
        measure_cost(spec, folder)
    else:
        fit_and_test(spec, folder)


def fit_and_test(spec: RunSpec, folder: Path) -> None:
    """Train as the recipe says, then test the weights that the training ends with (averaged ones if it averages)."""
    from evmamba.launch.record import (
        ProgressWriter,
        ResultWriter,
        TrainingRecord,
        add_callbacks,
        weights_in_memory,
        write_progress,
    )
    from evmamba.launch.train import EvmambaCLI

    write_progress(folder, "preparing")
    cli = EvmambaCLI(spec.cli_arguments(folder), run=False)
    record = TrainingRecord()
    writer = ResultWriter(
        folder, cli.plain_config(), spec.name, weights=weights_in_memory(cli.trainer), extra={"spec_hash": spec.hash}
    )
    add_callbacks(cli.trainer, record, ProgressWriter(folder, record), writer)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    writer.training = record.summary(cli.trainer)
    cli.model.output_dir = folder
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def measure_cost(spec: RunSpec, folder: Path) -> None:
    """Parameters, MACs, latency at batch 1, throughput and memory of the classifier for 1000 classes at 224 x 224."""
    import torch

    from evmamba import cost
    from evmamba.launch.record import write_progress
    from evmamba.tasks.backbones import build_backbone

    start = datetime.datetime.now(datetime.UTC)
    write_progress(folder, "measuring")
    torch.manual_seed(spec.seed)
    size = (3, 224, 224)
    model = build_backbone(spec.model, features_only=False, num_classes=1000)
    macs = cost.count_macs(model, size)
    precision = spec.precision or "32-true"
    steps: dict[str, Any] = {"warmup": spec.timing["warmup_steps"], "steps": spec.timing["timed_steps"]}
    where: dict[str, Any] = {"device": spec.device, "amp": precision.startswith("bf16")}
    single = cost.measure_inference(model, size, 1, **steps, **where)
    batch = cost.measure_inference(model, size, spec.timing["batch_size"], **steps, **where)
    write_result(
        Result(
            run=spec.name,
            task="cost",
            model=spec.model,
            cost={
                "parameters": cost.count_parameters(model),
                "macs": macs.paper,
                "macs_plain": macs.plain,
                "latency_ms_median": single["latency_ms_median"],
                "latency_ms_p95": single["latency_ms_p95"],
                "images_per_s": batch["images_per_s"],
                "batch_size": spec.timing["batch_size"],
                "peak_memory_mb": batch["peak_memory_mb"],
                "peak_memory_kind": batch["peak_memory_kind"],
            },
            protocol={"input_size": list(size), "num_classes": 1000} | spec.timing,
            provenance=provenance(
                config=dataclasses.asdict(spec),
                seed=spec.seed,
                device=device_name(spec.device),
                precision=precision,
                start=start,
            )
            | {"spec_hash": spec.hash, "threads": torch.get_num_threads()},
        ),
        folder,
    )


def main(argv: list[str] | None = None) -> int:
    arguments: list[Any] = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m evmamba.launch.run FOLDER/spec.json", file=sys.stderr)
        return 2
    path = Path(arguments[0])
    spec, folder = RunSpec.read(path), path.parent
    start = datetime.datetime.now(datetime.UTC)
    quiet_warnings()
    quiet_logs()
    try:
        run(spec, folder)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        reason = " ".join(str(error).split())
    except Exception as error:
        # The log keeps the whole story, the table its first line.
        traceback.print_exc()
        first = str(error).strip().splitlines()
        reason = f"{type(error).__name__}{': ' + first[0] if first else ''} (see {folder / 'run.log'})"
    else:
        return 0
    print(f"failed: {reason}", file=sys.stderr)
    write_result(failed_result(spec, reason, start), folder)
    return 1


if __name__ == "__main__":
    sys.exit(main())
