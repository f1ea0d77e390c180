"""One training or evaluation as its spec says it, from LightningCLI's options to the result."""

import dataclasses
import json
from pathlib import Path

from evmamba.launch.fit.cli import EvmambaCLI
from evmamba.launch.fit.exported import measure_exported
from evmamba.launch.fit.loggers import logger_settings
from evmamba.launch.fit.record import (
    Background,
    ProgressWriter,
    ResultWriter,
    TrainingRecord,
    add_callbacks,
    result_of,
    weights_in_memory,
)
from evmamba.launch.fit.scales import accuracy_at_scales
from evmamba.launch.fit.signals import ignore_time_limit
from evmamba.launch.fit.strategies import whole_parameters
from evmamba.launch.fit.weights import BACKBONE_FILE, load_weights, save_weights
from evmamba.launch.store.result_schema import Provenance
from evmamba.launch.store.results import FILE_NAME, read_result, trained_from_scratch, write_result
from evmamba.launch.store.spec import EvaluationSpec, TrainingSpec, origin_of
from evmamba.tasks.trust import modules_in


def fit_and_test(spec: TrainingSpec, folder: Path) -> None:
    """Train as the recipe says, then test the weights that the training ends with (averaged ones if it averages).

    A training that was interrupted in this folder is continued.

    Leaves those weights in the folder. Without a test (`spec.test`) it stops there; its result has no metrics.
    """
    cli = EvmambaCLI(cli_arguments(spec, folder), run=False, named=modules_in(spec.settings))
    record = TrainingRecord()
    background = Background(spec.name, cli.plain_config(), weights_in_memory(cli.trainer), origin_of(spec), spec.suite)
    add_callbacks(cli.trainer, record, ProgressWriter(folder, record))
    # Also a training that is finished: its last validation is repeated, and the module holds its weights again.
    cli.begin()
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, weights_only=True)
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    if cli.begun is not None and cli.begun.finished:
        ignore_time_limit()  # the test is all that this start has to do
    background = dataclasses.replace(background, training=record.summary(cli.trainer))
    with whole_parameters(cli.trainer):
        if cli.trainer.is_global_zero:
            save_weights(cli.model, folder)
            if not spec.test:
                trained = result_of(cli.trainer, cli.model, cli.datamodule, background)
                trained.protocol["stage"] = "fit"
                write_result(trained, folder)
    if not spec.test:
        return
    if spec.test_scales:
        points = accuracy_at_scales(cli.trainer, cli.model, cli.datamodule, spec.test_scales)
        background = dataclasses.replace(background, sweeps={"input_size": points})
    add_callbacks(cli.trainer, ResultWriter(folder, background))
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def evaluate(spec: EvaluationSpec, folder: Path) -> None:
    """Test the weights that a training ended with, under options of the test's own (multi-scale, say)."""
    trained_folder = spec.start.folder(folder)
    cli = EvmambaCLI(cli_arguments(spec, folder), run=False, named=modules_in(spec.settings))
    load_weights(cli.model, trained_folder)
    trained = read_result(trained_folder / FILE_NAME)
    weights = f"{trained.protocol.get('weights', 'last epoch')} of {trained.run}"
    origin = origin_of(spec) | Provenance(from_scratch=trained_from_scratch(trained))
    background = Background(spec.name, cli.plain_config(), weights, origin, spec.suite, trained.training)
    if spec.exported:
        exported = measure_exported(cli.trainer, cli.model, cli.datamodule, folder)
        background = dataclasses.replace(background, exported=exported)
    add_callbacks(cli.trainer, ProgressWriter(folder, TrainingRecord()), ResultWriter(folder, background))
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def cli_arguments(spec: TrainingSpec | EvaluationSpec, folder: Path) -> list[str]:
    """LightningCLI's options for a run, with everything it writes under `folder`."""
    own = spec.resources
    options = {
        "trainer.accelerator": spec.device,
        "trainer.num_nodes": own.nodes,
        "trainer.devices": own.devices,
        "trainer.strategy": own.strategy,
    }
    told = spec.settings.get("trainer", {})
    options = {option: value for option, value in options.items() if option.removeprefix("trainer.") not in told}
    start = spec.start if isinstance(spec, TrainingSpec) else None
    options |= {
        "seed_everything": spec.seed,
        "data.init_args.batch_size": own.batch_size,
        "trainer.accumulate_grad_batches": own.accumulate,
        "trainer.default_root_dir": folder,
        "trainer.logger": json.dumps(logger_settings(folder, spec.loggers if isinstance(spec, TrainingSpec) else ())),
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.init_args.checkpoint": start.folder(folder) / BACKBONE_FILE if start else None,
    }
    settings = [f"--{part}={json.dumps(value)}" for part, value in spec.settings.items()]
    return [*settings, *(f"--{option}={value}" for option, value in options.items() if value is not None)]
